"""vista_loss against an independent per-sample reference in fp64, written from Eq. 8-10."""

import itertools

import pytest
import torch

from tests.helpers import reference
from vista_patch import vista_loss
from vista_patch.config import CHOICES

SETTINGS = list(itertools.product(("l2", "cosine"), ("mean", "sum"), ("t/m", "t", "one")))


def batch(dtype=torch.float32, d=32, seed=0):
    """Rows: text-image-text; text only; two images; image cut at the end; left-padded; image only."""
    g = torch.Generator().manual_seed(seed)
    rows = [
        "TTIIIITTTTTTTT..",
        "TTTTTTTTTT......",
        "TIITTTTIIITTTT..",
        "TTTTTTTTTTTTTIII",
        "....TIIIITTTTTTT",
        "IIIIII..........",
    ]
    kinds = [list(row) for row in rows]
    text = torch.tensor([[k == "T" for k in row] for row in kinds])
    image = torch.tensor([[k == "I" for k in row] for row in kinds])
    x = torch.randn(len(rows), 16, d, generator=g, dtype=torch.float64)
    h = torch.randn(len(rows), 16, d, generator=g, dtype=torch.float64)
    x = x * (text | image)[..., None]  # padding embeddings are zeros upstream
    return x.to(dtype), h.to(dtype), text, image


@pytest.mark.parametrize("metric,reduction,ramp", SETTINGS)
def test_fp32_equals_the_reference(metric, reduction, ramp, monkeypatch):
    monkeypatch.setattr("vista_patch.loss.CHUNK", 1000)  # several chunks, the last one ragged
    x, h, text, image = batch()
    loss = vista_loss(x, h, text, image, metric=metric, reduction=reduction, ramp=ramp).loss
    torch.testing.assert_close(loss.double(), reference(x, h, text, image, metric, reduction, ramp), rtol=1e-5, atol=0)


@pytest.mark.parametrize("metric,reduction,ramp", SETTINGS)
def test_bf16_input_is_accumulated_in_fp32(metric, reduction, ramp):
    # The reference reads the same bf16 values, so only the accumulation differs: fp32, hence the fp32 tolerance.
    x, h, text, image = batch(torch.bfloat16)
    loss = vista_loss(x, h, text, image, metric=metric, reduction=reduction, ramp=ramp).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference(x, h, text, image, metric, reduction, ramp), rtol=1e-5, atol=0)


@pytest.mark.parametrize("metric,reduction,ramp", SETTINGS)
def test_gradients_equal_finite_differences_and_the_reference(metric, reduction, ramp, monkeypatch):
    monkeypatch.setattr("vista_patch.loss.CHUNK", 100)
    x, h, text, image = batch(torch.float64, d=5)
    x.requires_grad_(), h.requires_grad_()

    def loss(x, h):
        return vista_loss(x, h, text, image, metric=metric, reduction=reduction, ramp=ramp).loss

    ours = torch.autograd.grad(loss(x, h), (x, h))
    slow = torch.autograd.grad(reference(x, h, text, image, metric, reduction, ramp), (x, h))
    torch.testing.assert_close(ours, slow, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(loss, (x, h))


@pytest.mark.parametrize("metric", ("l2", "cosine"))
def test_bf16_gradients_are_the_fp32_ones_rounded(metric):
    x, h, text, image = batch(torch.bfloat16)
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf, state = (tensor.detach().to(dtype).requires_grad_() for tensor in (x, h))
        vista_loss(leaf, state, text, image, metric=metric).loss.backward()
        grads.append((leaf.grad.float(), state.grad.float()))
    # One rounding to bf16 (8 bits: 2^-8 relative); h's gradient reaches one position, so it is rounded once too.
    torch.testing.assert_close(grads[0], grads[1], rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("metric", ("l2", "cosine"))
def test_nothing_to_align_is_zero_with_the_graph_whole(metric):
    x, h, text, image = batch()
    x.requires_grad_(), h.requires_grad_()
    result = vista_loss(x, h, text, torch.zeros_like(image), metric=metric)
    result.loss.backward()
    assert result.loss == 0 and result.share == 0
    assert x.grad.abs().sum() == 0 and h.grad.abs().sum() == 0


def test_a_collapsed_distance_is_zero_and_not_a_cancellation_error():
    _, h, text, image = batch()
    s = h[:1, :1] * 100
    x = s.expand_as(h).contiguous()
    assert vista_loss(x, x, text, image).loss == 0
    assert vista_loss(x, x, text, image).cosine == pytest.approx(1, abs=1e-5)


def test_detach_text_trains_only_the_hidden_state():
    x, h, text, image = batch()
    x.requires_grad_(), h.requires_grad_()
    vista_loss(x, h, text, image, detach_text=True).loss.backward()
    assert x.grad is None and h.grad.abs().sum() > 0


def test_share_and_cosine_count_the_samples_that_have_image_and_text():
    x, h, text, image = batch(torch.float64)
    result = vista_loss(x, h, text, image)
    assert result.share == pytest.approx(4 / 6)
    one = reference(x, h, text, image, "cosine", "mean", "one")
    torch.testing.assert_close(result.cosine, -one)


@pytest.mark.parametrize("metric", ("l2", "cosine"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_compiled_loss_is_the_eager_one(metric, dtype):
    """In one graph, forward and backward. aot_eager runs the same kernels, so every bit is the same."""
    x, h, text, image = batch(dtype)
    leaves = x.requires_grad_(), h.requires_grad_()

    def loss(x, h):
        return vista_loss(x, h, text, image, metric=metric).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(compiled, loss(*leaves))
    grads = [torch.autograd.grad(value, leaves) for value in (compiled, loss(*leaves))]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_every_metric_of_the_settings_is_computed():
    for metric in CHOICES["metric"]:
        if metric != "off":
            assert vista_loss(*batch(), metric=metric).loss.isfinite()


def test_non_finite_values_come_out_as_they_are():
    x, h, text, image = batch()
    x[0, 0] = float("nan")
    assert not vista_loss(x, h, text, image).loss.isfinite()


def test_no_fp32_copy_of_bf16_embeddings():
    """The largest fp32 tensor made is a chunk, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            nonlocal largest
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                    largest = max(largest, value.numel())
            return out

    B, L, d = 4, 1024, 1024
    x = torch.randn(B, L, d).bfloat16().requires_grad_()
    h = torch.randn(B, L, d).bfloat16().requires_grad_()
    image = torch.zeros(B, L, dtype=torch.bool)
    image[:, 5:50] = True
    with Watch():
        vista_loss(x, h, ~image, image).loss.backward()
    assert 0 < largest <= 2**20 < B * L * d


@pytest.mark.parametrize("setting", ({"metric": "L2"}, {"metric": "off"}, {"reduction": "none"}, {"ramp": "m"}))
def test_unknown_settings_are_refused(setting):
    with pytest.raises(ValueError, match=f"vista {next(iter(setting))} is"):
        vista_loss(*batch(), **setting)
