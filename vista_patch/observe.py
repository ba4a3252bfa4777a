"""Finds VISTA's tokens by watching one training step: text is what the token embedding gave, image is the rest.

A position of the decoder's input is **text** where its vector is, bit for bit, one that `get_input_embeddings()` gave
in the same step for a token of `input_ids`. It is **image** where it is attended and not text. Nothing else is asked:
no splice, no label, no class, no name of a module. So it does not matter who puts images between the text, or how.

x_t is the vector of the t-th text token as it enters the decoder's first block, before any position is added. So it
holds the model's own scale of embeddings (Gemma's sqrt(d), which some releases of transformers apply in the embedding
and some in the decoder) and the noise of NEFTune. S_n is the decoder's last hidden state, after the final norm, at the
last image position.

What the model does with the text is checked against `input_ids` in each step: every attended token that is not the
place of an image must arrive, in order, unaltered. Anything else raises RuntimeError.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .config import VistaConfig
from .loss import CHUNK, VistaLoss, vista_loss

NONE = -(2**62)  # the id and the key of nothing
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SOME = 32  # the numbers that tell a vector from others where the decoder gets another dtype than the embedding gives
OFF = "or set model.config.vista = {'metric': 'off'}"

MEND = (
    "vista_patch.attach(trainer) adds the term to whatever loss a trainer computes; in a loop of your own train on "
    f"outputs.loss, {OFF}"
)

TEXT_LOST = (
    "row {0}: token {1} of input_ids did not arrive as its embedding gave it (the next text there is {2}; -1: none). "
    "Where text is altered, dropped or reordered before the decoder, x_t is not known. If token {1} is the place of an "
    "image, name it: model.config.image_token_ids = [{1}], with all others of that kind. If rows are cut at a longest "
    "length, set model.config.tokenizer_model_max_length to it. Or set model.config.vista = {{'metric': 'off'}}"
)

PACKED = (
    "{0} does not tell the samples apart that are packed in a row: give position_ids that begin anew (with M-RoPE four "
    "planes, the text's first) or cu_seq_lens, and a 2-D attention_mask of 0 and 1"
)
LOOKS_AHEAD = (
    "its image tokens attend to later text, so their hidden states have seen x_t: the term has no meaning on it"
)

bypassed: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()  # why a model was last trained without its term
_places: "WeakKeyDictionary[nn.Module, tuple[nn.Module, nn.Module, nn.Module | None]]" = WeakKeyDictionary()
_open: list["Step"] = []


Doubt = tuple[str, Tensor]  # what would be wrong, as a format, and its `flag`


class Embedded(NamedTuple):
    """One call of the token embedding."""

    ids: Tensor  # [N]
    keys: Tensor  # [N], of its vectors
    some: Tensor  # [N, SOME], the first numbers of each


class Run(NamedTuple):
    """One run of the decoder in a step."""

    vista: VistaLoss
    h: Tensor
    doubts: list[Doubt]


class Step:
    """What is seen of one training step of `model`, between `observe` and `term`.

    given: the step's inputs by name: input_ids [B, T], and where there are any attention_mask, labels, position_ids.
    """

    def __init__(self, model: nn.Module, config: VistaConfig, given: Mapping[str, Any], adds: bool):
        self.model, self.config, self.given, self.adds = model, config, dict(given), adds
        for key in ("input_ids", "attention_mask"):  # some models overwrite what they are given
            if torch.is_tensor(self.given.get(key)):
                self.given[key] = self.given[key].clone()
        self.table, self.decoder, self.block = locate(model)
        self.gradient = torch.is_grad_enabled()
        self.embedded: list[Embedded] = []
        self.runs: list[Run] = []
        self.looked_up = 0  # runs that got ids in place of embeddings
        self.entered: Tensor | None = None  # what the first block got, and its mask
        self.masked: Any = None
        self.in_loss = False
        self.raises = adds or "labels" not in given  # labels=None is said on purpose: only the log can tell it is wrong
        self.why = "the loss that its forward returns is not the one that is trained on"
        if not adds:
            self.why = "its forward got no labels, as with label smoothing or compute_loss_func, which take them out"

    def error(self, what: str) -> RuntimeError:
        return RuntimeError(f"VISTA: {type(self.model).__name__}: {what}; {OFF}")

    def on_embedded(self, table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = (*args, *kwargs.values())[0]
        if torch.is_tensor(output) and output.shape[:-1] == ids.shape:
            # No more is kept of it, since the whole may not live as long as the step.
            some = output.detach()[..., :SOME].flatten(0, -2).clone()
            self.embedded.append(Embedded(ids.flatten(), keys(output).flatten(), some))

    def on_entry(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.entered is None:
            self.entered = args[0] if args else kwargs.get("hidden_states")
            self.masked = bind(block.forward, args, kwargs).get("attention_mask")

    def on_decoded(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The term of this run, as soon as the decoder returns: later the logits would be in memory beside it."""
        (entered, masked), self.entered, self.masked = (self.entered, self.masked), None, None
        if torch.is_grad_enabled() != self.gradient:
            return  # a run that is only looked at
        own, name = bind(decoder.forward, args, kwargs), type(decoder).__name__
        x, h = own.get("inputs_embeds"), last_hidden(output)
        if getattr(decoder, "_is_replica", False):
            raise self.error("torch.nn.DataParallel runs one model in several threads: start with torchrun")
        for key, value in own.items():
            if "cross_attention_states" in key and value is not None:
                raise self.error(
                    f"its decoder, {name}, reads images by cross-attention ({key}): no image token has a hidden state, "
                    "so the term has no meaning on it"
                )
        self.guard(h)
        if x is None or not self.adds:
            self.looked_up += 1
            return
        ids, seen, mask = (self.given.get("input_ids"), self.given.get("attention_mask"), own.get("attention_mask"))
        if not torch.is_tensor(ids) or not self.embedded:
            raise self.error(
                f"its decoder, {name}, got embeddings that its get_input_embeddings() did not give: pass input_ids, "
                "not inputs_embeds; a model that looks up its text in another table is not reached"
            )
        if x.shape[:2] != h.shape[:2] or len(x) != len(ids):
            raise self.error(
                f"its decoder, {name}, got {tuple(x.shape[:2])} (rows, positions) and returned {tuple(h.shape[:2])} "
                f"for {len(ids)} rows of input_ids: rows are packed or dropped on the way, or not the first axis, so "
                "the term has no place"
            )
        if torch.is_tensor(seen) and seen.ndim != 2:
            raise self.error(PACKED.format(f"a {seen.ndim}-D attention_mask"))
        masks = [m for m in (mask, seen) if torch.is_tensor(m) and m.shape == x.shape[:2]]
        real = seen > 0 if torch.is_tensor(seen) and seen.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
        text, image, doubts = self.kinds(x, ids, real, masks[0] > 0 if masks else None)
        if torch.is_tensor(seen) and seen.dtype != torch.bool:
            doubts.append((PACKED.format("an attention_mask of 1, 2, ..."), flag(seen > 1)))
        for wide in [*(mask.values() if isinstance(mask, dict) else [mask]), masked]:
            square = torch.is_tensor(wide) and wide.ndim == 4 and wide.shape[-2:] == (x.shape[1],) * 2
            if square or hasattr(wide, "mask_mod"):
                doubts.append((LOOKS_AHEAD, leak(wide, text, image)))
        x = self.scaled(x, entered, text)
        vista = self.compute(x, h, text, image, self.samples(own, x, doubts))
        if self.gradient and vista.loss.requires_grad:
            vista.loss.register_hook(self.mark)  # type: ignore[no-untyped-call]
        self.runs.append(Run(vista, h, doubts))

    def kinds(self, x: Tensor, ids: Tensor, real: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, list[Doubt]]:
        """Text and image, bool [B, L], of the decoder's input x [B, L, d], and what speaks against it.

        ids, real: [B, T], the step's tokens and which of them are attended. mask: bool [B, L], or None.
        """
        T, L = ids.shape[1], x.shape[1]
        same = all(each.some.dtype == x.dtype for each in self.embedded)
        keys_BL = keys(x if same else x[..., :SOME])
        found = [each.keys if same else keys(each.some.to(x.dtype)) for each in self.embedded]
        known = Known(torch.cat([each.ids for each in self.embedded]), torch.cat(found), ids, real)
        spliced = L != T
        if mask is None:  # then zeros at the ends of rows are padding, where rows were put together anew
            mask = inside(keys_BL != 0)
            if not spliced:
                mask = mask | ~(ids < 0).any()
        id_BL, match_BL = known.id_of_key(keys_BL)
        match_BL = match_BL & (mask | (keys_BL != 0))
        id_BT = known.id(ids)

        # The places of images: negative ids, and those that the config names, unless they arrive as text.
        named, cuts = named_tokens(self.model.config, ids), L in lengths(self.model.config)
        named_BT = among(ids, named)
        found_BT = count(torch.where(match_BL, id_BL, NONE), id_BT)
        arrived = (id_BT != NONE) & (found_BT > count(torch.where(named_BT, NONE, id_BT), id_BT))
        place_BT = (ids < 0) | (named_BT & ~arrived)

        # Two ways to feed a decoder: attended tokens alone, or all tokens with their padding.
        width = max(T, L)
        got = compact(id_BL, match_BL, width)
        want = compact(id_BT, real & ~place_BT, width)
        all_BT = ~place_BT & (real | (id_BT != NONE))
        whole = compact(id_BT, all_BT, width)
        short = cuts & mask.all(1) & ((got == want) | (got == -1)).all(1)  # cut at the model's longest row
        as_wanted, as_whole = (got == want).all(1) | short, (got == whole).all(1)
        rank_BL = (match_BL.cumsum(1) - 1).clamp(min=0)
        attended_BL = compact(real.long(), all_BT, width).gather(1, rank_BL) > 0
        text_BL = match_BL & (attended_BL | as_wanted[:, None])
        # LLaVA before 2024 lengthens its mask without looking where the images are: only its ends tell padding.
        image_BL = ~match_BL & (inside(mask) if spliced else mask)
        if spliced:  # nor does it tell padding on the left, which may be zeros
            image_BL = image_BL & (real[:, :1] | ((keys_BL != 0).cumsum(1) > 0))

        wrong_B = ~as_wanted & ~as_whole
        row = wrong_B.long().argmax().view(1)
        at = (got != want).index_select(0, row).long().argmax(1, keepdim=True)
        lost = compact(ids, real & ~place_BT, width).index_select(0, row).gather(1, at)
        there = got.index_select(0, row).gather(1, at)
        empty_B = (place_BT & real).any(1) & ~image_BL.any(1) & ~(cuts & mask.all(1))
        doubts = [
            (TEXT_LOST, flag(wrong_B, row, lost, there)),
            (
                "row {0} of input_ids has a place for an image, but no image arrives",
                flag(empty_B, empty_B.long().argmax()),
            ),
        ]
        if holds_images(self.given):
            shown = among(ids, named_tokens(self.model.config, ids, r"(image|video)_token_(id|index)")) & real
            as_text = flag(shown.any() & ~image_BL.any())
            doubts.append(("images enter by another way than inputs_embeds: their tokens arrive as text", as_text))
        return text_BL, image_BL, doubts

    def scaled(self, x: Tensor, entered: Tensor | None, text: Tensor) -> Tensor:
        """x as it enters the first block, where that is a multiple of it: Gemma's decoder scales its embeddings."""
        if entered is None or entered is x or entered.shape != x.shape or entered.data_ptr() == x.data_ptr():
            return x
        if self.decoder not in _scales:  # asked once: this reads from the device
            a, b = (t.detach()[text][:64].double() for t in (x, entered))
            factor = (a * b).sum() / (a * a).sum()
            if not len(a):  # no text to tell it by, nor to add a term for
                return x
            multiple = torch.allclose(b, factor * a, rtol=2e-2, atol=1e-6)
            _scales[self.decoder] = bool(multiple and (factor - 1).abs() > 0.02)
        return entered if _scales[self.decoder] else x

    def samples(self, own: Mapping[str, Any], x: Tensor, doubts: list[Doubt]) -> Tensor | None:
        """[B, L] int, the sample that each position belongs to, where the caller packed several in a row."""
        (B, L), given = x.shape[:2], {**own, **self.given}
        for key, value in given.items():
            if "cu_seq" in key and torch.is_tensor(value):
                if B != 1:
                    raise self.error(PACKED.format(f"{key} with {B} rows"))
                position = torch.arange(L, device=value.device)
                return torch.searchsorted(value[1:].contiguous(), position, right=True)[None]
        if torch.is_tensor(given.get("seq_idx")):
            idx: Tensor = given["seq_idx"]
            return idx.expand(B, L)
        pos = self.given.get("position_ids")
        if not torch.is_tensor(pos):
            return None
        if pos.ndim == 3 and len(pos) == 4:  # Qwen-VL's: the text's own, then three for M-RoPE
            pos = pos[0]
        if pos.ndim == 3 or pos.shape[1] != L:
            starts = (pos == 0).flatten(0, -3).all(0) if pos.ndim == 3 else pos == 0
            mask = self.given.get("attention_mask")
            starts = starts & (mask > 0) if torch.is_tensor(mask) and mask.shape == starts.shape else starts
            doubts.append((PACKED.format(f"position_ids of shape {tuple(pos.shape)}"), flag(starts.sum(-1) > 1)))
            return None
        starts = (pos == 0) | (pos.diff(dim=1, prepend=pos[:, :1]) < 0)
        return starts.cumsum(1).expand(B, L)

    def compute(self, x: Tensor, h: Tensor, text: Tensor, image: Tensor, samples: Tensor | None) -> VistaLoss:
        c, parts = self.config, []
        term = partial(vista_loss, metric=c.metric, reduction=c.reduction, ramp=c.ramp, detach_text=c.detach_text)
        for b, row in enumerate([] if samples is None else samples.diff(dim=1).ne(0).tolist()):
            at = [0, *(i for i, begins in enumerate(row, 1) if begins), len(row) + 1]
            parts += [(slice(b, b + 1), slice(i, j)) for i, j in pairwise(at)]
        if len(parts) <= len(x):  # one sample a row
            return term(x, h, text, image)
        each = [term(x[p], h[p], text[p], image[p]) for p in parts]
        full = torch.stack([(text[p] | image[p]).any() for p in parts])  # the others are padding
        share = torch.stack([v.share for v in each])
        loss, cosine = ((torch.stack([v[i] for v in each]) * share).sum() / share.sum().clamp(min=1) for i in (0, 1))
        return VistaLoss(loss, cosine, share.sum() / full.sum().clamp(min=1))

    def mark(self, gradient: Tensor) -> None:
        self.in_loss = True

    def guard(self, h: Tensor) -> None:
        """Raises in the backward pass where the decoder is trained on a loss that lacks the term."""

        def check(gradient: Tensor) -> None:
            if not self.in_loss:
                bypassed[self.model] = self.why
                if self.raises:
                    raise RuntimeError(
                        f"VISTA: {type(self.model).__name__} is trained without its term: {self.why}. {MEND}"
                    )

        if self.gradient and h.requires_grad and holds_images(self.given):
            h.register_hook(check)  # type: ignore[no-untyped-call]

    def term(self, loss: Tensor | None) -> VistaLoss | None:
        """The term of the runs that `loss` was computed from; None where no image can have been among them."""
        runs, name = self.runs, type(self.model).__name__
        if len(runs) > 1 and loss is not None and loss.requires_grad:
            reached = reaches(loss, [run.h for run in runs])
            runs = [run for run, yes in zip(runs, reached, strict=True) if yes]
        for number, run in enumerate(runs, 1):
            more = f"its decoder ran more than once, and in run {number}: " if len(self.runs) > 1 else ""
            read(self.model, [(f"VISTA: {name}: {more}{text}", figures) for text, figures in run.doubts])
        if not runs:
            if self.looked_up == 0 or (holds_images(self.given) and not self.runs):
                how = "was given images by another way than inputs_embeds" if self.looked_up else "did not run"
                raise self.error(
                    f"its decoder, {type(self.decoder).__name__}, {how}: pass input_ids through the model's own forward"
                )
            return None
        if len(runs) == 1:
            return runs[0].vista
        # A model that runs at several scales of the image trains on the mean of their losses.
        share = torch.stack([run.vista.share for run in runs])
        counted = (share > 0).sum().clamp(min=1)
        loss, cosine = (torch.stack([run.vista[i] for run in runs]).sum() / counted for i in (0, 1))
        return VistaLoss(loss, cosine, share.sum() / counted)


_scales: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


@contextmanager
def observe(model: nn.Module, config: VistaConfig, given: Mapping[str, Any], adds: bool = True) -> Iterator[Step]:
    """Hooks the token embedding and the decoder of `model` for one step. Raises TypeError where it has none.

    adds: whether the caller adds the term to a loss; else it is only watched that nobody trains on one without it.

    Hooks are set anew each time: so they come after those that alter the embedding's output (NEFTune, PEFT), and
    nothing of ours is in the model when it is copied, saved or wrapped.
    """
    step = Step(model, config, given, adds)
    hooks = [
        step.table.register_forward_hook(step.on_embedded, with_kwargs=True),
        step.decoder.register_forward_hook(step.on_decoded, with_kwargs=True),
    ]
    if step.block is not None:
        hooks.append(step.block.register_forward_pre_hook(step.on_entry, with_kwargs=True))
    _open.append(step)
    try:
        yield step
    finally:
        _open.remove(step)
        for hook in hooks:
            hook.remove()


def observed(model: nn.Module) -> bool:
    """Whether a step of the decoder in `model` is observed now: who opened it adds the term."""
    return bool(_open) and any(step.decoder is locate(model)[1] for step in _open)


def locate(model: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """The token embedding, the decoder and its first block, if it has any by a list.

    The decoder is the innermost module around the embedding whose forward takes inputs_embeds.
    Raises TypeError where there is no such module.
    """
    name = type(model).__name__
    table: Any = None
    with suppress(AttributeError, NotImplementedError):
        table = model.get_input_embeddings()  # type: ignore[operator]
    found = _places.get(model)
    if found and found[0] is table:
        return found
    for path in [path for path, module in model.named_modules(remove_duplicate=False) if module is table]:
        parts = path.split(".")
        for n in range(len(parts) - 1, 0, -1):
            decoder = model.get_submodule(".".join(parts[:n]))
            forwards = (decoder.forward, type(decoder).forward)  # an instance's own may hide what it takes
            if any("inputs_embeds" in inspect.signature(forward).parameters for forward in forwards):
                lists = (m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m))
                block = next((m[0] for m in lists), None)
                _places[model] = table, decoder, block
                return _places[model]
    raise TypeError(
        f"VISTA: {name} has no decoder that VISTA can find: no module around its get_input_embeddings() takes "
        "inputs_embeds, so there is no known place for the term"
    )


class Known:
    """The vectors that the embedding gave for tokens of `ids`, by their keys. Equal vectors count as one token: the
    one with the smallest id (tokens that were added to a vocabulary often begin as copies)."""

    def __init__(self, given: Tensor, found: Tensor, ids: Tensor, real: Tensor):
        """given, found: [N], the tokens that the embedding was asked for, and the keys of what it gave."""
        # Images may come out of the same embedding, and be zeros as a padding token is.
        text = among(given, ids) & ((found != 0) | among(given, torch.where(real, ids, NONE)))
        found = torch.where(text, found, NONE)
        self.ids, order = given.sort(stable=True)
        self.keys = found[order]
        self.sorted_keys, order = self.keys.sort(stable=True)
        self.first_ids = self.ids[order]

    def id_of_key(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.searchsorted(self.sorted_keys, wanted).clamp(max=len(self.sorted_keys) - 1)
        return self.first_ids[at], (self.sorted_keys[at] == wanted) & (wanted != NONE)

    def id(self, ids: Tensor) -> Tensor:
        """The token that counts for each of `ids`; NONE where the embedding was not asked for it."""
        at = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        found, _ = self.id_of_key(self.keys[at])
        return torch.where(self.ids[at] == ids, found, NONE)


def keys(vectors: Tensor) -> Tensor:
    """An integer for each vector [..., n], of all its bits; 0 for zeros. A sum of integers is the same in any order."""
    rows = vectors.detach().flatten(0, -2)
    size = rows.shape[1] * rows.element_size()
    word = 8 if size % 8 == 0 else rows.element_size()
    random = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (size // word,), generator=random) * 2 + 1
    factors = factors.to(rows.device, non_blocking=True)
    found = []
    at_once = max(1, (CHUNK if rows.is_cpu else 32 * CHUNK) // len(factors))  # as the loss does
    for part in torch.split(rows, at_once):
        words = part.contiguous().view(BITS[word]).long()
        found.append(((words ^ (words >> 29)) * factors).sum(-1))  # so that a sign bit moves more than the highest one
    return torch.cat(found).view(vectors.shape[:-1])


def compact(values: Tensor, chosen: Tensor, width: int) -> Tensor:
    """[B, width]: each row's chosen values, moved together to the left; then -1."""
    at = torch.where(chosen, chosen.cumsum(1) - 1, width)
    return values.new_full((len(values), width + 1), -1).scatter(1, at, values)[:, :width]


def inside(mask: Tensor) -> Tensor:
    """True from each row's first true position to its last."""
    return (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)


def among(values: Tensor, others: Tensor) -> Tensor:
    """Which values are among the others (torch.isin may wait for the device)."""
    return count(others, values) > 0


def count(values: Tensor, wanted: Tensor) -> Tensor:
    """How often each of `wanted` is among the values."""
    ordered = values.flatten().sort().values
    return torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)


def flag(wrong: Tensor, *figures: Tensor) -> Tensor:
    """int64 [4]: whether anything is wrong, and what its text tells, filled up with zeros."""
    found = torch.cat([value.long().view(1) for value in (wrong.any(), *figures)])
    return nn.functional.pad(found, (0, 4 - len(found)))


def leak(mask: Any, text: Tensor, image: Tensor) -> Tensor:
    """Whether a row's last image token attends to later text.

    mask: [B or 1, heads or 1, L, L], bool or added to the scores, or flex attention's BlockMask. What is bool may say
    what is seen or what is not (MPT, BLOOM): a token sees itself.
    """
    position = torch.arange(text.shape[1], device=text.device)
    last = torch.where(image, position, -1).amax(1, keepdim=True)
    row, at = torch.arange(len(text), device=text.device)[:, None], last.clamp(min=0)
    if torch.is_tensor(mask):
        mask = mask[:, 0].expand(len(text), -1, -1)
        scores = mask[row, at, position]
        attends = scores == mask[row, at, at] if mask.dtype == torch.bool else scores > -1
    else:
        attends = mask.mask_mod(row, torch.zeros_like(row), at, position[None])
    return flag(attends & text & (position > last) & (last >= 0))


def reaches(loss: Tensor, states: list[Tensor]) -> list[bool]:
    """Which of the states `loss` was computed from, by autograd's graph."""
    seen: set[Any] = set()
    wanted, todo = {state.grad_fn for state in states}, [loss.grad_fn]
    while todo and not wanted <= seen:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return [state.grad_fn in seen for state in states]


_late: "WeakKeyDictionary[nn.Module, list[tuple[list[str], Tensor, Any]]]" = WeakKeyDictionary()


def read(model: nn.Module, doubts: list[Doubt], wait: bool = False) -> None:
    """Raises RuntimeError for the first doubt that is true: on a CPU and in the first step at once.

    A GPU's are copied aside and read when they have come, which is in the next step: nothing waits for the device.
    """
    first, late = model not in _late, _late.setdefault(model, []) if doubts else _late.get(model, [])
    if doubts:
        texts, figures = [text for text, _ in doubts], torch.stack([figures for _, figures in doubts])
        if figures.is_cuda and not first:
            there = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            there.copy_(figures, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            late.append((texts, there, event))
        else:
            late.append((texts, figures, None))
    while late and (wait or late[0][2] is None or late[0][2].query()):
        texts, figures, event = late.pop(0)
        if event is not None:
            event.synchronize()
        for text, (wrong, *numbers) in zip(texts, figures.tolist(), strict=True):
            if wrong:
                raise RuntimeError(text.format(*numbers))


def named_tokens(
    config: Any, ids: Tensor, pattern: str = r"(image|img|im|video|vision|visual|audio|speech)\w*token\w*"
) -> Tensor:
    """The ids that the config, or a config in it, keeps under a name such as image_token_id."""
    found = []
    for key, value in settings(config):
        if re.fullmatch(pattern, key):
            values = value if isinstance(value, (list, tuple)) else [value]
            found += [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    return torch.tensor(found or [NONE], dtype=ids.dtype).to(ids.device, non_blocking=True)


def lengths(config: Any) -> set[int]:
    """The lengths that the config names as a longest one."""
    return {v for key, v in settings(config) if "max" in key and isinstance(v, int)}


def settings(config: Any) -> Iterator[tuple[str, Any]]:
    for key, value in vars(config).items():
        yield key, value
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from settings(value)


def bind(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, those in **kwargs too."""
    signature = inspect.signature(forward)
    given = signature.bind_partial(*args, **kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given


def holds_images(given: Any) -> bool:
    """Whether a call was given images, or features of them."""
    if torch.is_tensor(given):
        return given.is_floating_point() and given.ndim > 1
    if isinstance(given, Mapping):
        return any(holds_images(value) for key, value in given.items() if "mask" not in key and "embeds" not in key)
    return isinstance(given, (list, tuple)) and any(map(holds_images, given))


def last_hidden(output: Any) -> Tensor:
    """[B, L, d]: what a decoder returned of its last hidden states, as a tuple or by name."""
    states: Tensor = output[0] if isinstance(output, tuple) else output["last_hidden_state"]
    return states
