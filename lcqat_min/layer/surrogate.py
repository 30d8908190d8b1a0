"""Gradients through a step: what to tell the optimizer when the forward pass rounds.

Rounding is flat almost everywhere, so its true gradient is zero and nothing would learn. A *surrogate* keeps
the forward and replaces the derivative dq/du. Let q = clip(round(u), 0, top), u the latent in bins:

    ste      1                                            straight-through
    clipped  1 for -1/2 <= u <= top + 1/2, else 0         stops latents that have left the grid
    dge      min( (1/k) |2r - 1|^(1/k - 1), ceiling )     r = u - floor(u), the place between two levels

The last is the differentiable gradient estimator of FP4 training (arXiv 2501.17116), with the k = 5 and
ceiling = 3 of LC-QAT's release. It is the slope of f(r) = 1/2 (1 + sign(2r - 1) |2r - 1|^(1/k)), a smooth
stair: 0.2 on a level and up to 3 at a boundary, so a latent about to cross gets a push up to 15 times as
strong. The ceiling costs area: the mean over a cell is 0.593, not 1.

Outside the outer levels the forward does not change, and there is no boundary to be pushed over. The released
code takes floor(u) up to `top` instead of `top - 1`: at u = top + 1/2 it sees a boundary that is not there
and returns 3. Here the cell index ends at top - 1, so the slope falls off alike on both sides.

For bit-planes c = sign(v) in {-1, +1}: one boundary, at zero. Same three surrogates, with u = (v + 1) / 2 and
top = 1; `clipped` then passes |v| <= 2.

All arithmetic is fp32: in bf16 a latent near a boundary can round to another code than the exported one.
"""

import torch
from torch import Tensor

ESTIMATORS = ("ste", "clipped", "dge")
DGE_POWER, DGE_CEILING = 5.0, 3.0


def slope(u: Tensor, top: int, estimator: str) -> Tensor:
    """Surrogate dq/du at latents u (bins, any shape) for q = clip(round(u), 0, top): shape and dtype of u."""
    if estimator == "ste":
        return torch.ones_like(u)
    if estimator == "clipped":
        return ((u >= -0.5) & (u <= top + 0.5)).to(u.dtype)
    if estimator == "dge":
        r = u - u.floor().clamp(0, top - 1)
        return ((2 * r - 1).abs().pow(1 / DGE_POWER - 1) / DGE_POWER).clamp(max=DGE_CEILING)
    raise ValueError(f"unknown gradient estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")


class _Surrogate(torch.autograd.Function):
    """Forward `value` as it is; backward grad * gain (None: 1, and then nothing is kept for backward)."""

    @staticmethod
    def forward(ctx, latent: Tensor, value: Tensor, gain: Tensor | None) -> Tensor:
        if gain is not None:
            ctx.save_for_backward(gain)
        return value

    @staticmethod
    def backward(ctx, grad: Tensor):
        return (grad * ctx.saved_tensors[0] if ctx.saved_tensors else grad), None, None


def round_to_levels(u: Tensor, top: int = 3, estimator: str = "ste") -> Tensor:
    """q = clip(round(u), 0, top) with a surrogate gradient.  u: latent in bins, fp32, any shape; q: the same.

    Halves go to the even neighbour, as in torch.round. Raises ValueError for an unknown estimator.
    """
    fixed = u.detach()
    gain = None if estimator == "ste" else slope(fixed, top, estimator)
    return _Surrogate.apply(u, fixed.round().clamp_(0, top), gain)


def sign_of(v: Tensor, estimator: str = "ste") -> Tensor:
    """c = sign(v) in {-1, +1} (zero counts as +1) with a surrogate gradient.  v: latent, fp32, any shape.

    One cell of `round_to_levels`, except for the tie at zero: with u = (v + 1) / 2 and c = 2 q - 1 the factors
    1/2 and 2 cancel in the slope. Raises ValueError for an unknown estimator.
    """
    fixed = v.detach()
    gain = None if estimator == "ste" else slope((fixed + 1) / 2, 1, estimator)
    return _Surrogate.apply(v, (fixed >= 0).float().mul_(2).sub_(1), gain)
