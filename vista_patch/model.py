"""VISTA in a LLaVA-style `forward`: a decorator, and the figures that it keeps for the log."""

import ast
import functools
import inspect
import linecache
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist

from .config import VistaConfig
from .loss import VistaLoss, vista_loss

# LLaVA's and its forks', which may append to the name; transformers' before 4.46.
SPLICES = ("prepare_inputs_labels_for_multimodal", "_merge_input_ids_with_image_features")
_SUMS = "_vista_sums"
_STEP = "_vista_step"  # while a forward is observed: one of a base class that it calls is not observed again
# The metric of --vista, from when a script has parsed it until its vista_setup. Without that it must not train.
PARSED = []


def vista_forward(forward):
    """Decorates the `forward` of a class that splices images into text with `prepare_inputs_labels_for_multimodal`.

    Adds `weight * vista_loss(...)` to the loss that `forward` returns, as `self.config.vista` says (VistaConfig).
    Where that is off or absent, the weight is 0, or the call is no training step on labels and images, or returns
    no loss (LLaVA-NeXT's DPO), what comes out is stock's. The splice and the decoder run as often as in stock.

    Which positions are text: the splice moves `labels` along with the tokens, so it is given each token's index in
    place of its label, and the labels are put back from what comes out. Truncation, padding on either side, several
    images and text-only rows are right because the splice itself has done them.

    Raises ValueError for settings it does not know, RuntimeError where the term could not be right: `forward` did
    not go through the splice, or the decoder ran on other rows, shortened them, or ran twice for the gradient.
    """
    return add_vista(forward, *_splice_call(forward))


def add_vista(forward, splice: str | None = None, targets: tuple[str, ...] = ()):
    """`vista_forward` for a splice of this name that unpacks into `targets`, or for none: see `_placeholders`."""
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def with_vista(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments
        config, labels = _config(self), given.get("labels")
        if PARSED and self.training and labels is not None:
            raise RuntimeError(
                f"VISTA: this script parsed --vista {PARSED[0]} but sets nothing up: call vista_patch.vista_setup("
                "trainer, model_args) before training; `python -m vista_patch check` may tell why `apply` did not"
            )
        if not (config.active and self.training) or labels is None or _STEP in vars(self):
            return forward(self, *args, **kwargs)
        step = _placeholders(self, given)
        spliced = _observe_splice(self, splice, targets, step) if splice else nullcontext()
        with spliced, _observe_decoder(self, config, step):
            output = forward(self, *args, **kwargs)
        ce = output[0] if isinstance(output, tuple) else output.get("loss")  # ross's first value is another
        if step.get("images") is False or ce is None or ce.numel() != 1:
            return output
        if "vista" not in step:
            way = splice or "its placeholders"
            raise RuntimeError(
                f"VISTA: {type(self).__name__}.forward did not take what it was given through {way} to its decoder: "
                "pass input_ids (not inputs_embeds), or set model.config.vista = {'metric': 'off'}"
            )
        # Newer transformers divide the sum over this micro-step's tokens by those of the whole optimizer step.
        items, share = kwargs.get("num_items_in_batch"), 1.0
        if items is not None:
            share = (labels[:, 1:] != -100).sum() / items
        vista = step["vista"]
        _record(self, ce.detach() / share, vista, step["rows"])
        total = ce + (config.weight * share * vista.loss).to(ce.dtype)
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


def _placeholders(model, given) -> dict:
    """transformers' LLaVA since 4.46 has one placeholder per image token in its input_ids: nothing moves."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    placeholder = getattr(model.config, "image_token_index", getattr(model.config, "image_token_id", None))
    if ids is None or placeholder is None:
        return {}
    image, real = ids == placeholder, torch.ones_like(ids) if mask is None else mask
    return {"text": ~image & real.bool(), "image": image}


def _decoder(model) -> torch.nn.Module:
    """The module that takes inputs_embeds to the last hidden states, without the head."""
    for name in ("get_model", "get_decoder", "model", "language_model", "transformer"):
        found = getattr(model, name, None)
        found = found() if name.startswith("get_") and found else found
        if isinstance(found, torch.nn.Module) and found is not model:
            return getattr(found, "base_model", found)  # transformers' name for what a head stands on
    raise TypeError(f"VISTA: {type(model).__name__} has its decoder under no name that VISTA knows, like get_model()")


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
        real = call.arguments["attention_mask"].bool().clone()  # some splices overwrite what they are given
        out = list(splice(*call.args, **call.kwargs))
        if len(out) != len(targets):
            raise RuntimeError(f"VISTA: {name} returned {len(out)} values where forward unpacks {len(targets)}")
        at = {target: i for i, target in enumerate(targets)}
        index, out_mask = out[at["labels"]], out[at["attention_mask"]].bool()
        placed, source = index >= 0, index.clamp(min=0)
        step.clear()
        step["images"] = out[at["inputs_embeds"]] is not None
        if step["images"]:
            # Generation A lengthens the mask without looking where the images are, so with padding on the left it
            # has zeros on real tokens. What is padded before its first or after its last one is so everywhere.
            inside = (out_mask.cumsum(1) > 0) & (out_mask.flip(1).cumsum(1).flip(1) > 0)
            step["text"], step["image"] = placed & real.gather(1, source), inside & ~placed
        out[at["labels"]] = torch.where(placed, labels.gather(1, source), index)
        out[at["attention_mask"]] = None if mask is None else out[at["attention_mask"]]
        return tuple(out)

    setattr(model, name, observed)
    try:
        yield
    finally:
        delattr(model, name)


@contextmanager
def _observe_decoder(model, config, step):
    """For one forward: computes the term as soon as the decoder returns.

    Here, and not after the loss: autograd frees the logits first then, and the term's gradient adds nothing to the
    peak memory. Of several runs it is the one with the gradient that counts (CAL's other one has no images).
    """
    gradient = torch.is_grad_enabled()

    def compute(module, args, kwargs, output):
        if "text" not in step or torch.is_grad_enabled() != gradient:
            return
        x, name = kwargs.get("inputs_embeds"), type(module).__name__
        h = output[0] if isinstance(output, tuple) else output["last_hidden_state"]
        if "vista" in step:
            raise RuntimeError(f"VISTA: {name} ran more than once in a step, so which run is meant is not known")
        if x is None or not x.shape[:2] == h.shape[:2] == step["text"].shape:
            shapes = [tuple(t.shape[:2]) for t in (step["text"], x, h) if t is not None]
            raise RuntimeError(
                f"VISTA: {name} did not get or return the rows that were spliced (shapes {shapes}): tokens are packed "
                "or dropped on the way, so the term has no place; set model.config.vista = {'metric': 'off'}"
            )
        step["rows"] = len(x)
        step["vista"] = vista_loss(
            x,
            h,
            step["text"],
            step["image"],
            metric=config.metric,
            reduction=config.reduction,
            ramp=config.ramp,
            detach_text=config.detach_text,
        )

    hook = _decoder(model).register_forward_hook(compute, with_kwargs=True)
    vars(model)[_STEP] = step
    try:
        yield
    finally:
        del vars(model)[_STEP]
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
            if name.startswith(SPLICES) and isinstance(node.targets[0], ast.Tuple):
                targets = tuple(getattr(target, "id", "") for target in node.targets[0].elts)
                missing = {"attention_mask", "inputs_embeds", "labels"} - set(targets)
                if missing:
                    raise TypeError(f"VISTA: {where} does not unpack {', '.join(sorted(missing))} from {name}")
                return name, targets
    raise TypeError(f"VISTA: {where} does not assign the values of {SPLICES[0]}(...) to names")
