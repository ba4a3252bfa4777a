"""VISTA in a model's forward: in the source by a decorator, on a model in memory by `patch`; and its figures."""

import functools
import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import FLAGS, VistaConfig, nearest
from .loss import VistaLoss
from .observe import MEND, Step, bind, bypassed, last_hidden, locate, observe, observed, read

# The metric of --vista, from when a script has parsed it until its vista_setup. Without that it must not train.
PARSED: list[str] = []
_sums: "WeakKeyDictionary[nn.Module, Tensor]" = WeakKeyDictionary()
_versions: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()
_watched: "WeakKeyDictionary[nn.Module, nn.Module]" = WeakKeyDictionary()


def vista_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the `forward` of a model that takes `input_ids`, `labels` and images, and returns a loss.

    Adds `weight * vista_loss(...)` to that loss, as `self.config.vista` says (VistaConfig). Where that is off or
    absent, the weight is 0, the model is in eval mode, or there are no labels, what comes out is stock's.
    `vista_patch.observe` says which positions are text and which are image.

    Raises ValueError for settings it does not know, TypeError where the model has no decoder to observe, RuntimeError
    where the term could not be right. The backward pass raises RuntimeError where the model is trained on images by a
    loss that lacks the term.
    """

    @functools.wraps(forward)
    def with_vista(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self, functools.partial(forward, self), *args, **kwargs)

    with_vista.adds_vista = True  # type: ignore[attr-defined]
    return with_vista


def _run(model: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    config = _config(model)
    if not model.training or not (PARSED or config.active):
        return forward(*args, **kwargs)
    given = bind(forward, args, kwargs)
    labels = given.get("labels")
    if PARSED and labels is not None:
        raise RuntimeError(
            f"VISTA: this script parsed --vista {PARSED[0]} but sets nothing up: call vista_patch.vista_setup("
            "trainer, model_args) before training; `python -m vista_patch check` may tell why `apply` did not"
        )
    if not config.active or observed(model):
        return forward(*args, **kwargs)
    with observe(model, config, given, adds=labels is not None) as step:
        output = forward(*args, **kwargs)
    ce = output[0] if isinstance(output, tuple) else output.get("loss")  # ross's first value is another
    if labels is None or ce is None or ce.numel() != 1:
        return output
    # Newer transformers divide the sum over this micro-step's tokens by those of the whole optimizer step.
    items = given.get("num_items_in_batch")
    total = add(step, ce, 1.0 if items is None else (labels[:, 1:] != -100).sum() / items)
    if isinstance(output, tuple):
        return (total, *output[1:])
    output["loss"] = total
    return output


def add(step: Step, ce: Tensor, share: float | Tensor, whole: bool = False) -> Tensor:
    """`ce` and this step's term, weighted.

    share: the part of an optimizer step's loss that this step gives; of `ce` too, unless that is `whole`.
    """
    vista = step.term(ce)
    alone = ce.detach()
    if not whole:
        alone = alone / share if isinstance(share, float) else torch.where(share > 0, alone / share, 0.0)
    record(step.model, alone, vista, len(step.given["input_ids"]))
    return ce if vista is None else ce + (step.config.weight * share * vista.loss).to(ce.dtype)


def record(model: nn.Module, ce: Tensor, vista: VistaLoss | None, samples: int) -> None:
    """Adds a micro-step to the model's running sums, on the device."""
    sums = _sums.setdefault(model, torch.zeros(7, device=ce.device))
    zero = torch.zeros((), device=ce.device)
    loss, cosine, share = (zero, zero, zero) if vista is None else (value.detach() for value in vista)
    finite = torch.isfinite(ce + loss) & (sums[0] == sums[1])  # and no earlier one was not
    applied = share * samples
    row = (sums.new_ones(()), finite, ce, loss, cosine * applied, applied, sums.new_tensor(samples))
    sums += torch.stack([value.to(sums.dtype) for value in row])


def vista_metrics(model: nn.Module, where: str = "this call") -> dict[str, float]:
    """Means over the micro-steps since the last call, and over ranks; empty where VISTA is off or nothing has run.

    loss_ce; loss_vista (unweighted); vista_cosine, of text tokens to s; vista_share, of samples the term applied to.
    It waits for the device: call it at logging steps, on every rank alike.
    Raises FloatingPointError, naming the term and the first micro-step before `where` that was not finite, and
    RuntimeError where the model has trained since the last call without the term.
    """
    holder = next((m for m in model.modules() if getattr(getattr(m, "config", None), "vista", None)), None)
    if holder is None or not _config(holder).active:
        return {}
    sums = next((_sums.pop(m) for m in model.modules() if m in _sums), None)
    if sums is None:
        sums = torch.zeros(7, device=next(model.parameters()).device)
    for module in model.modules():  # the observed one may lie inside of others that show its config (PEFT, DDP)
        read(module, [], wait=True)
    finite = sums[1].clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    steps, _, ce, vista, cosine, applied, samples = sums.tolist()
    trained = [p for p in model.parameters() if p.requires_grad]
    version = sum(p._version for p in trained)
    before = _versions.get(holder)
    _versions[holder] = version
    noted = [bypassed.pop(module) for module in model.modules() if module in bypassed]
    if steps == 0:
        changed = version != before if before is not None else any(p.grad is not None for p in trained)
        why = next(iter(noted), f"no step went through what adds it ({whose(holder)})" if changed else None)
        if why:
            raise RuntimeError(f"VISTA: {type(holder).__name__} was trained without its term: {why}. {MEND}")
        return {}
    bad = [name for name, value in (("loss_ce", ce), ("loss_vista", vista)) if value - value != 0]
    if bad:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        raise FloatingPointError(
            f"VISTA: {' and '.join(bad)} not finite, first at micro-step {int(finite) + 1} since the last log before "
            f"{where}. Nothing was skipped or reset; look at that batch, the learning rate and the dtype."
        )
    return {
        "loss_ce": ce / steps,
        "loss_vista": vista / steps,
        "vista_cosine": cosine / applied if applied else 0.0,
        "vista_share": applied / samples,
    }


def patch(model: nn.Module, metric: str = "l2", **settings: Any) -> "Patch":
    """Makes `model`, or the model inside of it (PEFT, DDP), add the VISTA term to its loss in training mode.

    `settings` are VistaConfig's others: reduction, ramp, weight, detach_text. The class's forward is decorated with
    `vista_forward`; another instance of it runs as before, for want of a config.vista. What the log needs is in
    `vista_metrics(model)`. For a trainer, `vista_patch.attach(trainer)` is the better way: there the term is added
    whoever computes the loss, and does not depend on how a batch is split.

    Raises ValueError on a setting that is none of the choices, TypeError where no module here takes labels and has a
    decoder that takes embeddings.
    """
    return Patch(model, configured(metric, settings))


def configured(metric: str, settings: dict[str, Any]) -> VistaConfig:
    for key in settings:
        if key not in FLAGS.values():
            raise ValueError(f"VISTA has no setting {key!r}: {nearest(key, FLAGS)}")
    return VistaConfig(metric, **settings)  # type: ignore[arg-type]


class Patch:
    """What `patch` has done to `model`. `undo` may be called twice."""

    def __init__(self, model: nn.Module, config: VistaConfig):
        self.model: Any = find(model)
        decoder = locate(self.model)[1]
        # An own forward of this instance hides the class's, whose base may hold the one that takes labels.
        own = "forward" in vars(self.model)
        self.owner: Any = self.model
        if not own:
            self.owner = next(c for c in type(self.model).__mro__ if _takes_labels(vars(c).get("forward")))
        forward = self.owner.forward
        if not hasattr(forward, "adds_vista"):
            added: Any = functools.partial(_run, self.model, forward) if own else vista_forward(forward)
            functools.update_wrapper(added, forward)
            added.adds_vista, added.patches = True, 0
            self.owner.forward = added
        if hasattr(self.owner.forward, "patches"):  # else it is in the source
            self.owner.forward.patches += 1
        self.watch = decoder.register_forward_hook(_watch, with_kwargs=True)
        _watched[decoder] = self.model
        settings: Any = self.model.config
        self.vista = vars(settings).get("vista")
        settings.vista = config.to_dict()
        self.done = True

    def undo(self) -> None:
        """Gives back the forward as it was, once no other patch needs it, and the config."""
        if not self.done:
            return
        self.done, forward = False, vars(self.owner).get("forward")
        self.watch.remove()
        if hasattr(forward, "patches"):
            forward.patches -= 1
            if forward.patches == 0:
                self.owner.forward = forward.__wrapped__
        del self.model.config.vista
        if self.vista is not None:
            self.model.config.vista = self.vista
        _sums.pop(self.model, None)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def find(model: nn.Module) -> nn.Module:
    """The outermost module that has a config, labels among its inputs, and a decoder. Raises TypeError."""
    for module in model.modules():
        if hasattr(type(module), "get_input_embeddings") and hasattr(module, "config"):
            forwards = [module.forward, *(vars(c).get("forward") for c in type(module).__mro__)]
            if any(_takes_labels(forward) for forward in forwards):
                if getattr(module.config, "is_encoder_decoder", False):
                    raise TypeError(
                        f"VISTA: {type(module).__name__} has an encoder and a decoder: there is no S_n in it"
                    )
                locate(module)
                return module
    raise TypeError(
        f"VISTA: no module of {type(model).__name__} takes labels and has get_input_embeddings(): there is no known "
        "place for the term"
    )


def _takes_labels(forward: Callable[..., Any] | None) -> bool:
    return forward is not None and "labels" in inspect.signature(forward).parameters


def _watch(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Of a patched model: whoever runs its decoder in training runs it by the forward that adds the term."""
    model = _watched.get(decoder)
    if model is None or not (decoder.training and torch.is_grad_enabled()) or observed(model):
        return
    config = _config(model)
    if config.active and (x := bind(decoder.forward, args, kwargs).get("inputs_embeds")) is not None:
        step = Step(model, config, {"images": x}, adds=True)
        step.why = f"its forward is not the patched one any more, but that at {whose(model)}"
        step.guard(last_hidden(output))


def whose(model: nn.Module) -> str:
    """The file and line of the forward that a call of the model runs now."""
    forward: Any = model.forward
    code = getattr(inspect.unwrap(forward) if hasattr(forward, "adds_vista") else forward, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(forward)


def _config(model: nn.Module) -> VistaConfig:
    return VistaConfig.from_dict(getattr(model.config, "vista", None) or {})
