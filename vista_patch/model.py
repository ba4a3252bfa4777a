"""VISTA in a LLaVA-style `forward`: a decorator, and the figures that it keeps for the log."""

import ast
import functools
import inspect
import linecache
from contextlib import contextmanager

import torch
import torch.distributed as dist

from .config import VistaConfig
from .loss import VistaLoss, vista_loss

SPLICE = "prepare_inputs_labels_for_multimodal"
_SUMS = "_vista_sums"


def vista_forward(forward):
    """Decorates the `forward` of a class that splices images into text with `prepare_inputs_labels_for_multimodal`.

    Adds `weight * vista_loss(...)` to the loss that `forward` returns, as `self.config.vista` says (VistaConfig).
    Where that is off or absent, the weight is 0, or the call is not a training step on labels and images,
    the stock forward runs untouched. The splice and the decoder run once, as in stock.

    Which positions are text: the splice moves `labels` along with the tokens, so it is given each token's index in
    place of its label, and the labels are put back from what comes out. Truncation, padding on either side, several
    images and text-only rows are right because the splice itself has done them.

    Raises ValueError for settings it does not know, RuntimeError where `forward` did not go through the splice.
    """
    signature = inspect.signature(forward)
    splice, targets = _splice_call(forward)

    @functools.wraps(forward)
    def with_vista(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments
        config = _config(self)
        if not (config.active and self.training) or given.get("labels") is None or given.get("images") is None:
            return forward(self, *args, **kwargs)
        step = {}
        with _observe_splice(self, splice, targets, step), _observe_decoder(self.get_model(), config, step):
            output = forward(self, *args, **kwargs)
        if "vista" not in step:
            raise RuntimeError(
                f"VISTA: {type(self).__name__}.forward got images but did not take them through {splice} to its "
                "decoder: pass input_ids (not inputs_embeds), or set model.config.vista = {'metric': 'off'}"
            )
        ce, vista = output[0], step["vista"]
        _record(self, ce.detach(), vista, len(given["labels"]))
        total = ce + config.weight * vista.loss.to(ce.dtype)
        if isinstance(output, tuple):
            return (total, *output[1:])
        output["loss"] = total
        return output

    with_vista.adds_vista = True  # vista_setup looks for it
    return with_vista


def vista_metrics(model: torch.nn.Module, where: str = "this call") -> dict[str, float]:
    """Means over the micro-steps since the last call, and over ranks; empty where VISTA is off.

    loss_ce; loss_vista (unweighted); vista_cosine, of text tokens to s; vista_share, of samples the term applied to.
    It waits for the device, and nothing else here does: call it at logging steps, on every rank alike.
    Raises FloatingPointError, naming the term and the first micro-step before `where` that was not finite.
    """
    if not _config(model).active:
        return {}
    holder = next((m for m in model.modules() if _SUMS in m.__dict__), None)
    sums = holder.__dict__.pop(_SUMS) if holder else torch.zeros(7, device=next(model.parameters()).device)
    finite = sums[1].clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    steps, _, ce, vista, cosine, applied, samples = sums.tolist()
    if steps == 0:
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


def _config(model) -> VistaConfig:
    return VistaConfig.from_dict(getattr(model.config, "vista", None) or {})


def _record(model, ce: torch.Tensor, vista: VistaLoss, samples: int) -> None:
    """Adds a micro-step to the model's running sums, on the device."""
    sums = model.__dict__.setdefault(_SUMS, torch.zeros(7, device=ce.device))
    finite = torch.isfinite(ce + vista.loss.detach()) & (sums[0] == sums[1])  # and no earlier one was not
    applied = vista.share * samples
    row = (
        sums.new_ones(()),
        finite,
        ce,
        vista.loss.detach(),
        vista.cosine * applied,
        applied,
        sums.new_tensor(samples),
    )
    sums += torch.stack([value.to(sums.dtype) for value in row])


@contextmanager
def _observe_splice(model, name, targets, step):
    """For one forward: calls the splice with token indices for labels and notes which output positions are text."""
    splice = getattr(model, name)
    signature = inspect.signature(splice)

    def observed(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        ids, mask, labels = (call.arguments.get(key) for key in ("input_ids", "attention_mask", "labels"))
        call.arguments["labels"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
        # A mask always goes in, since only a mask tells padding from image tokens in what comes out.
        call.arguments["attention_mask"] = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        out = list(splice(*call.args, **call.kwargs))
        if len(out) != len(targets):
            raise RuntimeError(f"VISTA: {name} returned {len(out)} values where forward unpacks {len(targets)}")
        at = {target: i for i, target in enumerate(targets)}
        index, out_mask = out[at["labels"]], out[at["attention_mask"]].bool()
        if out[at["inputs_embeds"]] is not None:
            text = (index >= 0) & out_mask
            step["text"], step["image"] = text, out_mask & ~text
        out[at["labels"]] = torch.where(index >= 0, labels.gather(1, index.clamp(min=0)), index)
        out[at["attention_mask"]] = None if mask is None else out[at["attention_mask"]]
        return tuple(out)

    setattr(model, name, observed)
    try:
        yield
    finally:
        delattr(model, name)


@contextmanager
def _observe_decoder(decoder, config, step):
    """For one forward: computes the term as soon as the decoder returns.

    Here, and not after the loss: autograd frees the logits first then, and the term's gradient adds nothing to the
    peak memory.
    """

    def compute(module, args, kwargs, output):
        if "text" in step:
            step["vista"] = vista_loss(
                kwargs["inputs_embeds"],
                output[0],
                step.pop("text"),
                step.pop("image"),
                metric=config.metric,
                reduction=config.reduction,
                ramp=config.ramp,
                detach_text=config.detach_text,
            )

    hook = decoder.register_forward_hook(compute, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _splice_call(forward) -> tuple[str, tuple[str, ...]]:
    """The splice's name and the names that `forward` unpacks its return into, read from the source of `forward`.

    Raises TypeError where there is no such assignment, or it lacks one of the names that the term needs.
    """
    code = forward.__code__
    where = f"{code.co_filename}:{code.co_firstlineno}"
    module = ast.parse("".join(linecache.getlines(code.co_filename)))
    for function in ast.walk(module):
        if isinstance(function, ast.FunctionDef) and function.name == forward.__name__:
            first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
            if first == code.co_firstlineno:
                break
    else:
        raise TypeError(f"VISTA: no source for {forward.__qualname__} at {where}: decorate the function in its file")
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            name = getattr(node.value.func, "attr", "")
            if name.startswith(SPLICE) and isinstance(node.targets[0], ast.Tuple):
                targets = tuple(getattr(target, "id", "") for target in node.targets[0].elts)
                missing = {"attention_mask", "inputs_embeds", "labels"} - set(targets)
                if missing:
                    raise TypeError(f"VISTA: {where} does not unpack {', '.join(sorted(missing))} from {name}")
                return name, targets
    raise TypeError(f"VISTA: {where} does not assign the values of {SPLICE}(...) to names")
