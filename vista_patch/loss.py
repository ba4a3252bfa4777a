"""The VISTA loss (arXiv 2505.10917, Eq. 9-10) and its cosine form, over padded multimodal batches.

Suffixes name a tensor's axes: B samples, L sequence positions, d hidden size.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import Metric, Ramp, Reduction, VistaConfig

# Elements of x that are held in fp32 at a time: 0.5 MiB, with what is made of it, stays in a CPU core's L2 cache.
# A GPU takes 32 times as many: fewer launches, for at most two temporaries of 16 MiB.
CHUNK = 2**17


class VistaLoss(NamedTuple):
    """Scalars in fp32 on the batch's device; `cosine` and `share` carry no gradient.

    loss:   the term, unweighted, mean over the samples it applies to (0 where there is none).
    cosine: mean cosine similarity of x_t to s over those samples' text tokens (each sample counts once).
    share:  fraction of the batch's samples that the term applies to.
    """

    loss: Tensor
    cosine: Tensor
    share: Tensor


def vista_loss(
    x_BLd: Tensor,
    h_BLd: Tensor,
    text_BL: Tensor,
    image_BL: Tensor,
    *,
    metric: Metric = "l2",
    reduction: Reduction = "mean",
    ramp: Ramp = "t/m",
    detach_text: bool = False,
) -> VistaLoss:
    """Distance of each text token's embedding x_t, t = 1..m, to s, the hidden state of the last image token.

    l2:     mean_t f(t) |x_t - s|^2       (Eq. 9; f(t) = t/m and reduction "sum" give Eq. 10 to the letter)
    cosine: -mean_t f(t) cos(x_t, s)      (Eq. 8 with cosine similarity for the mutual information)

    Args:
        x_BLd: the decoder's input embeddings, any float dtype.
        h_BLd: the decoder's last hidden states, after the final norm, any float dtype.
        text_BL, image_BL: bool, true at text tokens and at image tokens; padding is in neither.
        metric: "l2" | "cosine".
        reduction: of |.|^2 over d: "mean" (Eq. 10 times 1/d, as the authors' code) | "sum" (Eq. 10). l2 only.
        ramp: f(t): "t/m" (Eq. 10) | "t" (the authors' LLaVA cosine code) | "one".
        detach_text: stop the gradient into x_t, so that only s learns.

    Samples without an image or without text do not count. Arithmetic is fp32 (fp64 for fp64 input), a chunk
    of L at a time: no fp32 tensor of [B, L, d] exists, and nothing is read back to the host.
    Raises ValueError on a setting that is none of the choices.
    """
    VistaConfig(metric, reduction, ramp)
    dtype = torch.promote_types(x_BLd.dtype, torch.float32)
    position_L = torch.arange(text_BL.shape[1], device=text_BL.device)
    last_B = torch.where(image_BL, position_L, -1).amax(1)  # -1: no image
    m_B1, t_BL = text_BL.sum(1, keepdim=True).to(dtype), text_BL.cumsum(1).to(dtype)
    applies_B = (last_B >= 0) & (m_B1[:, 0] > 0)
    s_Bd = h_BLd[torch.arange(len(h_BLd), device=h_BLd.device), last_B.clamp(min=0)].to(dtype)

    x_BLd = x_BLd.detach() if detach_text else x_BLd
    ss_B1 = s_Bd.square().sum(1, keepdim=True)
    if metric == "l2":
        xx_BL, dd_BL = _InnerProducts.apply(x_BLd, s_Bd, True)  # type: ignore[no-untyped-call]
        xs_BL = (xx_BL + ss_B1 - dd_BL) / 2  # for the figure `cosine` alone
        distance_BL = dd_BL / x_BLd.shape[2] if reduction == "mean" else dd_BL
        cosine_BL = _cosine(xs_BL, xx_BL, ss_B1)
    elif metric == "cosine":
        xx_BL, xs_BL = _InnerProducts.apply(x_BLd, s_Bd, False)  # type: ignore[no-untyped-call]
        cosine_BL = _cosine(xs_BL, xx_BL, ss_B1)
        distance_BL = -cosine_BL
    else:
        raise ValueError(f"vista metric is {metric!r}: vista_loss computes 'l2' and 'cosine'")

    f_BL = {"t/m": t_BL / m_B1.clamp(min=1), "t": t_BL, "one": torch.ones_like(t_BL)}[ramp]
    per_token_BL = text_BL * applies_B[:, None] / (m_B1.clamp(min=1) * applies_B.sum().clamp(min=1))
    return VistaLoss(
        loss=(per_token_BL * f_BL * distance_BL).sum(),
        cosine=(per_token_BL * cosine_BL.detach()).sum(),
        share=applies_B.to(dtype).mean(),
    )


def _cosine(xs: Tensor, xx: Tensor, ss: Tensor) -> Tensor:
    return xs * (xx * ss).clamp(min=torch.finfo(xs.dtype).tiny).rsqrt()  # padding is 0: no 0/0 there


class _InnerProducts(torch.autograd.Function):
    """x.x, and |x - s|^2 if `difference` else x.s, of every position, in the dtype of s, without a copy of x in it.

    |x - s|^2 is summed from the difference: x.x - 2 x.s + s.s would cancel where x comes close to s.
    """

    @staticmethod
    def forward(ctx: Any, x_BLd: Tensor, s_Bd: Tensor, difference: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BLd, s_Bd)
        ctx.difference = difference
        s_B1d, norms, others = s_Bd[:, None], [], []
        for (x,) in _chunks(x_BLd):
            x = x.to(s_Bd.dtype)
            norms.append(torch.linalg.vector_norm(x, dim=-1))
            others.append(torch.linalg.vector_norm(x - s_B1d, dim=-1) if difference else torch.bmm(x, s_B1d.mT)[..., 0])
        other_BL = torch.cat(others, 1)
        return torch.cat(norms, 1).square(), other_BL.square() if difference else other_BL

    @staticmethod
    def backward(ctx: Any, g_xx_BL: Tensor, g_other_BL: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x_BLd, s_Bd = ctx.saved_tensors
        # d/dx = a x + b s and d/ds = sum_t (b x + c s), with per-position a, b, c.
        if ctx.difference:
            a_BL, b_BL, c_BL = 2 * (g_xx_BL + g_other_BL), -2 * g_other_BL, 2 * g_other_BL
        else:
            a_BL, b_BL, c_BL = 2 * g_xx_BL, g_other_BL, torch.zeros_like(g_other_BL)
        needed, s_B1d = ctx.needs_input_grad[0], s_Bd[:, None]
        g_x_BLd = torch.empty_like(x_BLd) if needed else x_BLd  # else it is only walked along
        g_s_B1d = c_BL.sum(1)[:, None, None] * s_B1d
        for x, g_x, a, b in _chunks(x_BLd, g_x_BLd, a_BL[..., None], b_BL[..., None]):
            x = x.to(s_Bd.dtype)
            g_s_B1d += torch.bmm(b.mT, x)
            if needed:
                g_x.copy_((a * x).addcmul_(b, s_B1d))
        return g_x_BLd if needed else None, g_s_B1d[:, 0], None


def _chunks(x_BLd: Tensor, *others_BL_: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in step, a chunk of x's L at a time."""
    B, _, d = x_BLd.shape
    size = max(1, (CHUNK if x_BLd.is_cpu else 32 * CHUNK) // (B * d))
    return zip(*(torch.split(tensor, size, dim=1) for tensor in (x_BLd, *others_BL_)), strict=True)
