"""LCQAT: the main method. Weights are affine maps of digits, w_hat = A q + b, and everything in it trains.

    1  random signs and a block-Hadamard rotation                             layer/rotation.py
    2  A, b fitted to the weights, each row divided by its root mean square   codebook/lloyd.py
    3  codes with error feedback, at the best of a few scales per row         ptq/ldlq.py
    4  A, b refitted to the layer's outputs, and codes again, as long as that lowers the proxy loss
    5  latents that round to the codes and keep the margin to the next one    layer/linear.py

LC-QAT is arXiv 2606.10531. Its paper has the lattice, its released code the scalar grid with frozen A; untied planes
are the representation of LiftQuant (2606.04050) with A and b for each matrix.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..codebook.affine import AffineCodebook, frame_planes, lattice, random_planes, scalar
from ..codebook.lloyd import fit, mean_squared_error
from ..errors import UsageError
from ..layer.linear import AffineLinear
from ..layer.surrogate import ESTIMATORS
from .method import FIT_VECTORS, Method, sample_vectors

CODEBOOKS = ("scalar", "lattice", "planes")
LARGEST_DIM = 8
FIT_ROUNDS = 8  # of the fit to a matrix
STARTS = 8  # random ones of small untied planes: for d = 2 most fits end at 0.115, the better ones at 0.1105


@dataclass(frozen=True, kw_only=True)
class LCQAT(Method):
    """codebook        scalar: 4 uniform levels, not fitted.  lattice: A [d, d] on {0..3}^d, the paper's form.
                    planes: A [d, 2d] on {-1, +1}^2d, untied.  All take 2 bits per weight
    dim             d, weights per vector (lattice, planes); with 4 a vector takes a byte
    estimator       gradient through the rounding: ste | clipped | dge
    learn_codebook  train A and b
    start_on_codes  latents start on the codes (LC-QAT's release), not at the unrounded targets
    """

    codebook: str = "planes"
    dim: int = 4
    estimator: str = "ste"
    learn_codebook: bool = True
    start_on_codes: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("codebook", CODEBOOKS)
        self.check("estimator", ESTIMATORS)
        if not 1 <= self.dim <= LARGEST_DIM:
            raise UsageError(f"LCQAT.dim is {self.dim}; a vector has 1 to {LARGEST_DIM} weights")

    def layer(self, W: Tensor, H: Tensor, bias: Tensor | None, generator: torch.Generator) -> AffineLinear:
        """As in Method. The seed of `generator` also decides the fit."""
        signs = self.signs(W, generator)
        book = normal_codebook(self.codebook, self.dim, generator.initial_seed()).to(W.device)
        W_r, factor = self.prepare(W, H, signs, book.dim)
        if fitted := self.codebook != "scalar":
            book = fit(sample_vectors(W_r, book.dim, FIT_VECTORS), book, FIT_ROUNDS)
        rounded = self.round(W_r, factor, book, fitted)
        target = None if self.start_on_codes else rounded.target
        return AffineLinear(rounded.coded, W.shape[1], bias, signs, target, self.estimator, self.learn_codebook)


@lru_cache(maxsize=8)
def normal_codebook(kind: str, dim: int, seed: int) -> AffineCodebook:
    """The codebook of a kind fitted to N(0, 1) weights, where every fit starts; made once (it takes seconds)."""
    if kind != "planes":
        return scalar() if kind == "scalar" else lattice(dim)
    if dim == 4:
        return frame_planes()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30_000, dim, generator=generator, dtype=torch.float32)
    if dim < 4:
        books = [fit(x, random_planes(dim, generator), rounds=40) for _ in range(STARTS)]
        return min(books, key=lambda book: mean_squared_error(x, book))
    half = normal_codebook(kind, dim // 2, seed)  # two of half the size side by side, then free
    rest = normal_codebook(kind, dim - dim // 2, seed)
    A = torch.block_diag(half.A, rest.A) + 0.05 * torch.randn(dim, 2 * dim, generator=generator, dtype=torch.float32)
    return fit(x[:12_000], AffineCodebook(A, torch.cat([half.b, rest.b]), 2), rounds=30)
