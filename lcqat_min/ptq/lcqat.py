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

from ..codebook.affine import EXACT_BITS, AffineCodebook, frame_planes, lattice, random_planes, scalar
from ..codebook.lloyd import fit, mean_squared_error
from ..errors import UsageError
from ..layer.linear import AffineLinear
from ..layer.surrogate import ESTIMATORS
from .method import FIT_VECTORS, Method, sample_vectors

CODEBOOKS = ("scalar", "lattice", "planes")
LARGEST_DIM, LARGEST_BITS = 8, 16  # of a vector
FIT_ROUNDS = 8  # of the fit to a matrix
STARTS = 8  # random ones of small untied planes: for d = 2 most fits end at 0.115, the better ones at 0.1105


@dataclass(frozen=True, kw_only=True)
class LCQAT(Method):
    """codebook        scalar: 4 uniform levels, not fitted.  lattice: A [d, d] on {0..3}^d, the paper's form.
                    planes: A [d, m] on {-1, +1}^m, untied
    bits            per weight: 2, and for planes any with m = bits * dim whole and at most 16
    dim             d, weights per vector (lattice, planes); with 4 weights of 2 bits a vector takes a byte
    estimator       gradient through the rounding: ste | clipped | dge
    learn_codebook  train A and b
    start_on_codes  latents start on the codes (LC-QAT's release), not at the unrounded targets
    """

    codebook: str = "planes"
    bits: float = 2.0
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
        m = self.bits * self.dim
        if not (m == int(m) and 1 <= m <= LARGEST_BITS) or (self.codebook != "planes" and self.bits != 2):
            got = f"LCQAT.bits is {self.bits} with codebook {self.codebook!r} and dim {self.dim}"
            raise UsageError(f"{got}: planes take bits with bits * dim = 1, 2, ... {LARGEST_BITS}, the others 2")

    def layer(self, W: Tensor, H: Tensor, bias: Tensor | None, generator: torch.Generator) -> AffineLinear:
        """As in Method. The seed of `generator` also decides the fit."""
        signs = self.signs(W, generator)
        book = normal_codebook(self.codebook, self.dim, generator.initial_seed(), self.bits).to(W.device)
        W_r, factor = self.prepare(W, H, signs, book.dim)
        if fitted := self.codebook != "scalar":
            book = fit(sample_vectors(W_r, book.dim, FIT_VECTORS), book, FIT_ROUNDS)
        rounded = self.round(W_r, factor, book, fitted)
        target = None if self.start_on_codes else rounded.target
        return AffineLinear(rounded.coded, W.shape[1], bias, signs, target, self.estimator, self.learn_codebook)


@lru_cache(maxsize=16)
def normal_codebook(kind: str, dim: int, seed: int, bits: float = 2.0) -> AffineCodebook:
    """The codebook of a kind fitted to N(0, 1) weights, where every fit starts; made once.

    It takes seconds, and a minute or more for vectors of 16 bits.
    """
    m = round(bits * dim)
    if kind != "planes":
        return scalar() if kind == "scalar" else lattice(dim)
    if (dim, m) == (4, 8):
        return frame_planes()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30_000, dim, generator=generator, dtype=torch.float32)
    if m <= EXACT_BITS:
        books = [fit(x, random_planes(dim, generator, m), rounds=40) for _ in range(STARTS)]
        return min(books, key=lambda book: mean_squared_error(x, book))
    if dim == 1:
        return fit(x, random_planes(1, generator, m), rounds=30)
    first = m * (dim // 2) // dim  # two of half the size side by side, then free
    half = normal_codebook(kind, dim // 2, seed, first / (dim // 2))
    rest = normal_codebook(kind, dim - dim // 2, seed, (m - first) / (dim - dim // 2))
    A = torch.block_diag(half.A, rest.A) + 0.05 * torch.randn(dim, m, generator=generator, dtype=torch.float32)
    return fit(x[:12_000], AffineCodebook(A, torch.cat([half.b, rest.b]), 2), rounds=30)
