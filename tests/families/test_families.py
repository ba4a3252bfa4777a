"""The term in every family of vision-language models that this environment's transformers has.

Loss and all gradients against the formula in fp64; logits and cross-entropy with the term on are bitwise stock's.
"""

import pytest
import torch

import vista_patch
from tests.families.reference import assert_same_gradients, batch, build, gradients, term
from tests.families.registry import FAMILIES, Family
from vista_patch import vista_metrics

pytestmark = pytest.mark.families
SETTINGS = [("l2", "mean", "t/m"), ("l2", "sum", "t/m"), ("cosine", "mean", "t/m"), ("l2", "mean", "t")]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
SUPPORTED = [name for name, family in FAMILIES.items() if not family.refused]


def release() -> str:
    import transformers

    return ".".join(transformers.__version__.split(".")[:2])


def here(name: str) -> Family:
    import transformers

    if not hasattr(transformers, FAMILIES[name].model):
        pytest.skip("not in this release")
    return FAMILIES[name]


@pytest.fixture
def family(request):
    return here(request.param)


def both(family, inputs, settings, weight=0.5, tune=lambda model: None):
    """Loss and gradients of the reference, and of a second model with the same weights under `patch`."""
    metric, reduction, ramp = settings
    model = build(family, family.dtype)
    output, expected = term(family, model, inputs, *settings)
    loss = output.loss if expected is None else output.loss + weight * expected
    loss.backward()
    want, model = gradients(model), build(family, family.dtype)
    tune(model)
    with vista_patch.patch(model, metric, reduction=reduction, ramp=ramp, weight=weight):
        actual = model(**inputs)
        actual.loss.backward()
        figures = vista_metrics(model)
    return actual, loss, gradients(model), want, figures, expected


@pytest.mark.parametrize("side", ("right", "left"))
@pytest.mark.parametrize("settings", SETTINGS, ids="-".join)
@pytest.mark.parametrize("family", SUPPORTED, indirect=True)
def test_term_and_gradients(family, settings, side):
    inputs = batch(family, build(family, family.dtype), side)
    actual, loss, grads, want, figures, expected = both(family, inputs, settings)
    torch.testing.assert_close(actual.loss.double(), loss.double(), rtol=1e-6, atol=0)
    assert figures["loss_vista"] == pytest.approx(expected.item(), rel=1e-6, abs=1e-8)
    assert figures["vista_share"] == pytest.approx(2 / 3)
    assert_same_gradients(grads, want, TOLERANCE[family.dtype])


@pytest.mark.parametrize("family", SUPPORTED, indirect=True)
def test_what_is_not_the_term_is_bitwise_stock(family):
    model = build(family)
    inputs = batch(family, model)
    stock = model(**inputs)
    with vista_patch.patch(model, weight=0.5):
        on = model(**inputs)
        assert torch.equal(on.logits, stock.logits)
        assert vista_metrics(model)["loss_ce"] == stock.loss.item() != on.loss.item()
        unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
        assert torch.equal(model(**unlabelled).logits, stock.logits)
        assert torch.equal(model.eval()(**inputs).loss, stock.loss)
    model.train()
    assert torch.equal(model(**inputs).loss, stock.loss)
    with vista_patch.patch(model, weight=0):
        off = model(**inputs)
        assert torch.equal(off.loss, stock.loss) and torch.equal(off.logits, stock.logits)


@pytest.mark.parametrize("family", SUPPORTED, indirect=True)
def test_text_alone_is_stock(family):
    model = build(family)
    inputs = batch(family, model, images=(0, 0))
    try:
        stock = model(**inputs)
    except (AttributeError, TypeError) as error:
        pytest.skip(f"stock fails on text alone: {error}")
    with vista_patch.patch(model):
        assert torch.equal(model(**inputs).loss, stock.loss)
        figures = vista_metrics(model)
        assert figures["loss_vista"] == figures["vista_share"] == 0 and figures["loss_ce"] == stock.loss.item()


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("family", SUPPORTED, indirect=True)
def test_checkpointing(family, reentrant):
    def tune(model):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    inputs = batch(family, build(family, family.dtype))
    actual, loss, grads, want, *_ = both(family, inputs, SETTINGS[0], tune=tune)
    torch.testing.assert_close(actual.loss.double(), loss.double(), rtol=1e-6, atol=0)
    # Gradients are added up in another order, some of them rounded to fp32 by the model.
    assert_same_gradients(grads, want, max(1e-6, TOLERANCE[family.dtype]))


@pytest.mark.parametrize("how", ("bf16", "autocast"))
@pytest.mark.parametrize("family", SUPPORTED, indirect=True)
def test_low_precision(family, how):
    """The term of bf16 vectors, taken in fp32; gradients are bf16's own, so only their direction is held."""
    model = build(family, torch.bfloat16 if how == "bf16" else torch.float32)
    inputs = batch(family, model)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        try:
            output, expected = term(family, model, inputs)
        except RuntimeError as error:
            pytest.skip(f"stock fails: {error}")
        (output.loss + expected).backward()
        want = gradients(model)
        with vista_patch.patch(model):
            model(**inputs).loss.backward()
            assert vista_metrics(model)["loss_vista"] == pytest.approx(expected.item(), rel=1e-5)
    grads = gradients(model)
    flat = [torch.cat([g[n].double().flatten() for n in want if want[n] is not None]) for g in (grads, want)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.999


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.refused], indirect=True)
def test_refused_by_name(family):
    model = build(family)
    inputs = batch(family, model)
    error = pytest.raises((TypeError, RuntimeError), match=f"VISTA: {family.model}: {family.refused}")
    with error, vista_patch.patch(model):
        model(**inputs)
    assert torch.isfinite(model(**inputs).loss)
