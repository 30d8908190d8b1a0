"""The layer of the linear trellis: latents round to bits, and the bits of neighbouring vectors give d weights.

    D_g = sum_{l = 0..reach}  A_l c_{g+l}    c = sign(latent)                  (codebook/trellis.py)

Latents [out, n m / d] are as for planes, and learn as they do. Each bit takes part in several vectors, so its gradient
is a sum over them, and so is the margin that it starts with: with the residual e = target - w_hat, flipping bit j of
vector g changes the squared error by 4 |a_j|^2 c (c + (sum_l a_lj^T e_{g-l}) / |a_j|^2), |a_j|^2 = sum_l |a_lj|^2.
"""

import torch
from torch import Tensor, nn

from ..codebook.digits import index_of
from ..codebook.matrix import CodedMatrix
from ..codebook.trellis import TrellisCodebook, filtered
from .linear import MARGIN, QuantLinear, Signs, root_mean_square
from .surrogate import sign_of


class TrellisLinear(QuantLinear):
    """w_g = sum_l A_l c_{g+l}. target, estimator, learn_codebook: as in AffineLinear."""

    method = "trellis"
    learned = ("taps",)

    def __init__(
        self,
        coded: CodedMatrix[TrellisCodebook],
        in_features: int,
        bias: Tensor | None,
        signs: Signs,
        target: Tensor | None = None,
        estimator: str = "ste",
        learn_codebook: bool = True,
    ):
        super().__init__(coded, in_features, bias, signs)
        self.estimator = estimator
        self.taps = nn.Parameter(coded.codebook.taps.clone(), requires_grad=learn_codebook)
        self.latent = nn.Parameter(starting_bits(coded, target).flatten(1))

    def digits(self) -> Tensor:
        """c as the forward pass uses them, fp32 [out, vectors, m]."""
        return sign_of(self.latent, self.estimator).view(self.out_features, -1, self.taps.shape[2])

    def decoded(self) -> Tensor:
        return filtered(self.digits(), self.taps).flatten(1)

    @torch.no_grad()
    def indices(self) -> Tensor:
        return index_of(self.digits(), 2)

    def codebook(self) -> TrellisCodebook:
        return TrellisCodebook(self.taps.detach())

    def settings(self) -> dict[str, object]:
        return {"estimator": self.estimator, "learn_codebook": self.taps.requires_grad}

    def units(self) -> dict[str, tuple[str, float]]:
        """A bin is 2 wide, from -1 to +1."""
        return super().units() | {"latent": ("latents", 2.0), "taps": ("codebooks", root_mean_square(self.taps))}


def starting_bits(coded: CodedMatrix[TrellisCodebook], target: Tensor | None = None) -> Tensor:
    """Latents that round to `coded.index`, fp32 [out, vectors, m]: as starting_latents, with the margins above."""
    book = coded.codebook
    c = book.digits(coded.index)
    if target is None:
        return c
    e = target.view(*coded.index.shape, book.dim) - book.decode(coded.index)
    norm = book.taps.square().sum((0, 1)).clamp(min=1e-12)
    return c + (book.transposed(e) / norm).clamp(MARGIN - 1, 1 - MARGIN)
