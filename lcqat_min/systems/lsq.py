"""LSQ: four uniform levels and a learned step per row. LSQ, arXiv 1902.08153; the grid of ParetoQ, arXiv 2502.02631.

    w_hat = r q        q = clip(round(w / r + 3/2), 0, 3) - 3/2, in {-1.5, -0.5, 0.5, 1.5}

The latents are the weights w themselves, and the step r is the row scale. Autograd with the clipped straight-through
gradient gives LSQ's

    d w_hat / d r = q - w / r  inside of the grid,  q = +-3/2  outside

In ParetoQ's units (SEQ) alpha = 2 r: levels +-alpha/4 and +-3 alpha/4. ParetoQ starts from alpha = the largest weight
of a row (`scale="max"`); a start with error feedback at the best of a few steps (`scale="search"`) is closer.

Limits: one step per row and no rotation by default, as published.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..codebook.affine import AffineCodebook, scalar
from ..codebook.digits import index_of
from ..codebook.matrix import CodedMatrix
from ..layer.linear import QuantLinear, Signs, starting_latents
from ..layer.surrogate import round_to_levels
from ..ptq.ldlq import SMALLEST_SCALE, round_matrix
from ..ptq.method import Method

SCALES = ("search", "max")


class StepLinear(QuantLinear):
    """Latents [out, n] are weights, and the row scale is the step. target: as in AffineLinear."""

    method = "lsq"

    def __init__(
        self, coded: CodedMatrix, in_features: int, bias: Tensor | None, signs: Signs, target: Tensor | None = None
    ):
        super().__init__(coded, in_features, bias, signs)
        bins = starting_latents(CodedMatrix(scalar().to(coded.scale.device), coded.index, coded.scale), target)
        self.latent = nn.Parameter((bins.flatten(1) - 1.5) * coded.scale[:, None])

    def decoded(self) -> Tensor:
        return round_to_levels(self.latent / self.row_scale[:, None] + 1.5, 3, "clipped") - 1.5

    @torch.no_grad()
    def indices(self) -> Tensor:
        return index_of(self.decoded()[..., None], 4)

    def codebook(self) -> AffineCodebook:
        return scalar().to(self.row_scale.device)

    def units(self) -> dict[str, tuple[str, float]]:
        """A bin is one step wide; the rows share their mean."""
        return super().units() | {"latent": ("latents", self.row_scale.detach().mean().item())}

    @torch.no_grad()
    def set_row_scale(self, scale: Tensor) -> None:
        """As in QuantLinear; the latents are scaled along with the steps, so that they round to the same codes."""
        index = self.indices()
        self.latent.mul_((scale / self.row_scale)[:, None])
        super().set_row_scale(scale)
        on_code = self.codebook().decode(index).flatten(1) * self.row_scale[:, None]
        self.latent.copy_(torch.where(self.indices() == index, self.latent, on_code))


@dataclass(frozen=True, kw_only=True)
class LSQ(Method):
    """scale: search, the best of several steps per row; max, half of a row's largest weight (ParetoQ's start)."""

    scale: str = "search"
    rotate: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("scale", SCALES)

    def layer(self, W: Tensor, H: Tensor, bias: Tensor | None, generator: torch.Generator) -> StepLinear:
        """As in Method, with a start by `scale`."""
        signs, grid = self.signs(W, generator), scalar().to(W.device)
        W_r, factor = self.prepare(W, H, signs, 1)
        if self.scale == "max":
            steps = (W_r.abs().amax(1) / 2).clamp(min=SMALLEST_SCALE)
            rounded = round_matrix(W_r, factor, grid, [steps], self.feedback)
        else:
            rounded = self.round(W_r, factor, grid)
        return StepLinear(rounded.coded, W.shape[1], bias, signs, rounded.target)
