"""The reference: batches, and the term by the paper's formula, one sample and one token after the other, in fp64.

x_t is the vector that the decoder's first block gets at a token of text. S_n is the decoder's last hidden state, as the
head gets it, at the last image token of the sample (arXiv 2505.10917, Eq. 8-10). The ids tell which tokens are text.
"""

import inspect

import torch

from tests.families.registry import BOS, PAD, Family


def build(family: Family, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides) -> torch.nn.Module:
    import transformers

    cls = getattr(transformers, family.model)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**family.config, **overrides))
    for p in model.parameters():  # some start as zeros, some as garbage
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.1)
    model.config.use_cache = False
    return model.to(dtype).train()


def rows(family: Family, images: list[int]) -> list[list[int]]:
    """A row for each entry: a prompt, that many images with text between them, an answer. Tokens recur."""
    made = []
    for row, n in enumerate(images):
        words = [3 + (7 * row + 5 * i) % 19 for i in range(9 + 3 * row)]
        ids = [BOS, *words[:3]]
        for i in range(n):
            ids += [*family.image, *words[3 : 5 + i]]
        made.append(ids + words[5:])
    return made


def batch(family: Family, model, side: str = "right", images=(1, 0, 2), given: list[list[int]] | None = None) -> dict:
    given = rows(family, list(images)) if given is None else given
    width = max(map(len, given))
    pad = [[PAD] * (width - len(row)) for row in given]
    ids = torch.tensor([p + r if side == "left" else r + p for p, r in zip(pad, given, strict=True)])
    mask = torch.tensor([[0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p)
                         for p, r in zip(pad, given, strict=True)])  # fmt: skip
    accepted = inspect.signature(type(model).forward).parameters
    placeholder = torch.isin(ids, torch.tensor(family.placeholders))
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs["labels"] = torch.where((mask > 0) & ~placeholder, ids, -100)
    inputs["labels"][:, :2] = -100
    if sum(images):
        dtype = next(model.parameters()).dtype
        pixels = {k: v for k, v in family.pixels(list(images)).items() if k in accepted}
        inputs |= {k: v.to(dtype) if v.is_floating_point() else v for k, v in pixels.items()}
    if family.types in accepted:
        inputs[family.types] = family.type_of(placeholder)
    return inputs


def term(family: Family, model, inputs: dict, metric="l2", reduction="mean", ramp="t/m"):
    """Stock's output, and the term in fp64 with its graph. `inputs` have no padding but what attention_mask hides."""
    heads = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: heads.append(args[0]))
    try:
        output = model(**inputs)
    finally:
        hook.remove()
    (h,), table = heads, model.get_input_embeddings().weight
    terms = []
    for ids, mask, h_Ld in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), h, strict=True):
        real = [i for i, attended in enumerate(mask) if attended]
        text = [i for i in real if ids[i] not in family.placeholders]
        images = [i for i in real if ids[i] in family.placeholders]
        if images and text:
            xs = [table[ids[i]] * torch.tensor(family.scale).to(table.dtype) for i in text]
            terms.append(sample(xs, h_Ld[images[-1]], metric, reduction, ramp))
    return output, sum(terms) / len(terms) if terms else None


def sample(xs: list[torch.Tensor], s: torch.Tensor, metric: str, reduction: str, ramp: str) -> torch.Tensor:
    """1/m sum_t f(t) |x_t - S_n|^2, or with -cos(x_t, S_n)."""
    total, m, s = 0.0, len(xs), s.double()
    for t, x in enumerate(xs, start=1):
        x, f = x.double(), {"t/m": t / m, "t": t, "one": 1.0}[ramp]
        if metric == "l2":
            squares = (x - s) ** 2
            total = total + f * (squares.mean() if reduction == "mean" else squares.sum())
        else:
            total = total - f * (x @ s) / (x.norm() * s.norm())
    return total / m


def gradients(model) -> dict[str, torch.Tensor]:
    grads = {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return grads


def assert_same_gradients(actual: dict, expected: dict, rtol: float = 1e-9, noise: float = 0.0) -> None:
    """Every parameter's, to `rtol` of its largest entry. What is 0 by symmetry (a key's bias) is only `noise`."""
    assert actual.keys() == expected.keys()
    noise = noise or 1e-3 * rtol * max(g.double().abs().max() for g in expected.values() if g is not None)
    wrong = {}
    for name, want in expected.items():
        got = actual[name]
        if want is None or got is None:
            if not (want is got is None or torch.count_nonzero(got if want is None else want) == 0):
                wrong[name] = "no gradient" if got is None else "a gradient where the reference has none"
            continue
        error = (got.double() - want.double()).abs().max()
        if not error <= noise + rtol * want.double().abs().max():
            wrong[name] = f"off by {(error / want.double().abs().max()).item():.1e}"
    assert not wrong, f"{len(wrong)} of {len(expected)} gradients differ: {dict(list(wrong.items())[:5])}"
