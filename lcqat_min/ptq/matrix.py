"""What to quantize to (QuantConfig), and one weight matrix quantized to it: the post-training start of a layer.

    normal_codebook    the codebook of a kind, fitted to N(0, 1) weights once
    prepare            W and its second moments H: rotated, padded to whole vectors, H factored
    round_layer        a codebook fitted to the weights, each row divided by its root mean square; codes with error
                       feedback at the best of a few scales a row; (A, b) refitted to the layer's outputs, and
                       codes again, as long as that lowers the proxy loss

The pieces are in codebook/affine.py (what is stored), codebook/lloyd.py (fits), layer/rotation.py, ptq/moments.py and
ptq/ldlq.py (rounding). ptq/model.py does this for every layer of a model.

Gives up: each matrix is rounded by itself, from the second moments of the unquantized model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from .. import codebook as cb
from ..codebook.lloyd import fit, mean_squared_error, table_start
from ..errors import UsageError
from ..layer.rotation import rotate
from ..layer.surrogate import ESTIMATORS
from .ldlq import SMALLEST_SCALE, Rounded, refit, round_matrix, row_scales
from .moments import Factor, factorize

CODEBOOKS = ("scalar", "lattice", "planes", "step", "table")
ROTATIONS = ("none", "input", "both")
SCALES = ("search", "max")
FIT_VECTORS = 1 << 14  # weight vectors of a matrix that its codebook is fitted to,
FIT_ROUNDS = 8  # in so many rounds
STARTS = 8  # random ones of small untied planes: for d = 2 most fits end at 0.115, the better ones at 0.1105


@dataclass(frozen=True)
class QuantConfig:
    """What to quantize to, and from which start. 2 bits a weight throughout.

    codebook      scalar: 4 uniform levels.  lattice: A [d, d] on {0..3}^d, the paper's form.  planes:
                  A [d, 2d] on {-1, +1}^2d, untied.  step: scalar with a learned step (LSQ).  table: 4^d
                  entries, one table for the model.
    dim           d, weights in a vector (lattice, planes, table); 4 makes a byte a vector
    rotate        none | input | both: where the block-Hadamard rotation acts
    feedback      carry rounding errors (LDLQ) or round plainly
    damping       added to the diagonal of the second moments, as a share of its mean; raised when needed
    scale         search: the best of several row scales; max: half a row's largest weight (ParetoQ's start),
                  without fit and refit
    refits        rounds of fitting (A, b) to the layer's outputs and of rounding again at scales nearby
    estimator     gradient through the rounding: ste | clipped | dge (step: always clipped; table: none)
    learn_codebook  train A and b, or the table; step has neither
    start_on_codes  latents start on the codes (LC-QAT's release), not at the unrounded targets (step: never)
    skip          parts of the names of layers that stay unquantized
    seed          of the random signs and of the codebook fit
    """

    codebook: str = "planes"
    dim: int = 4
    rotate: str = "both"
    feedback: bool = True
    damping: float = 0.01
    scale: str = "search"
    refits: int = 1
    estimator: str = "ste"
    learn_codebook: bool = True
    start_on_codes: bool = False
    skip: tuple[str, ...] = ("lm_head",)
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"codebook": CODEBOOKS, "rotate": ROTATIONS, "estimator": ESTIMATORS, "scale": SCALES}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise UsageError(f"QuantConfig.{name} is {value!r}; choose one of {', '.join(allowed)}")
        most = 8 if self.codebook in ("lattice", "planes") else 4
        if not 1 <= self.dim <= most:
            raise UsageError(
                f"QuantConfig.dim is {self.dim}; a {self.codebook} codebook takes 1 to {most} weights a vector"
            )
        if not 0 <= self.damping < 1 or self.refits < 0:
            raise UsageError(
                f"QuantConfig.damping is {self.damping} and refits {self.refits}; damping is a "
                "share, from 0 to less than 1, and refits a count, 0 or more"
            )
        if isinstance(self.skip, str):
            raise UsageError(f"QuantConfig.skip is the text {self.skip!r}; give a tuple: ({self.skip!r},)")

    @property
    def vector(self) -> int:
        """Weights in a vector of this codebook: 1 for the scalar kinds, else `dim`."""
        return 1 if self.codebook in ("scalar", "step") else self.dim


@lru_cache(maxsize=8)
def normal_codebook(kind: str, dim: int, seed: int) -> cb.Codebook:
    """The codebook of a kind fitted to N(0, 1) weights: where every fit starts, made once (takes seconds)."""
    generator = torch.Generator().manual_seed(seed)
    if kind in ("scalar", "step"):
        return cb.scalar()
    if kind == "lattice":
        return cb.lattice(dim)
    x = torch.randn(30_000, dim, generator=generator, dtype=torch.float32)
    if kind == "table":
        return fit(x, table_start(x, 4**dim, generator), rounds=20)
    if dim == 4:
        return cb.frame_planes()
    if dim < 4:
        books = [fit(x, cb.random_planes(dim, generator), rounds=40) for _ in range(STARTS)]
        return min(books, key=lambda book: mean_squared_error(x, book))
    half = normal_codebook(kind, dim // 2, seed)  # two of half the size side by side, then free
    rest = normal_codebook(kind, dim - dim // 2, seed)
    A = torch.block_diag(half.A, rest.A) + 0.05 * torch.randn(dim, 2 * dim, generator=generator, dtype=torch.float32)
    return fit(x[:12_000], cb.AffineCodebook(A, torch.cat([half.b, rest.b]), 2), rounds=30)


def prepare(W: Tensor, H: Tensor, signs: tuple, config: QuantConfig) -> tuple[Tensor, Factor]:
    """W and the factor of H in the basis of the codes, padded to whole vectors."""
    if signs[0] is not None:
        H = rotate(rotate(H, signs[0].double()).T, signs[0].double())
    n = len(H)
    H = pad(pad(H, config.vector).T, config.vector)
    H.diagonal()[n:] = 1e-9 * H.diagonal()[:n].mean()  # padding is cut off again: its error hardly counts
    return pad(rotated(W, signs), config.vector), factorize(H, config.damping)


def round_layer(W: Tensor, factor: Factor, table: nn.Parameter | None, config: QuantConfig) -> Rounded:
    """Round at the best of a few scales a row, then again near them; affine codebooks are refitted in between."""
    if table is not None:
        book = cb.TableCodebook(table.detach().to(W.device))
    else:
        book = normal_codebook(config.codebook, config.dim, config.seed).to(W.device)
    if config.scale == "max":
        return round_matrix(W, factor, book, [(W.abs().amax(1) / 2).clamp(min=SMALLEST_SCALE)], config.feedback)
    if fitted := config.codebook in ("lattice", "planes"):
        book = fit(sample_vectors(W, config.dim, FIT_VECTORS), book, rounds=FIT_ROUNDS)
    best = round_matrix(W, factor, book, row_scales(W), config.feedback)
    for _ in range(config.refits):
        book = refit(W, best, factor.H) if fitted else best.codebook
        other = round_matrix(W, factor, book, [best.scale * near for near in (0.95, 1.0, 1.05)], config.feedback)
        if other.loss.sum() >= best.loss.sum():
            break
        best = other
    return best


def in_units(x: Tensor) -> tuple[Tensor, float]:
    """x in units of a power of four near its largest number, and that unit: squares then fit fp32, no digit changes."""
    largest = x.abs().max().item()
    unit = 4.0 ** max((math.frexp(largest)[1] - 1) // 2, -63) if largest else 1.0  # no smaller: it would be subnormal
    return x / unit, unit


def rotated(W: Tensor, signs: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """W [out, in], rotated on the sides whose signs (fp32 [in], [out]) are given."""
    signs_in, signs_out = signs
    W = W if signs_in is None else rotate(W, signs_in)
    return W if signs_out is None else rotate(W.T, signs_out).T.contiguous()


def pad(x: Tensor, d: int) -> Tensor:
    """The last dimension filled up with zeros to a multiple of d."""
    return nn.functional.pad(x, (0, -x.shape[-1] % d))


def sample_vectors(W: Tensor, d: int, count: int) -> Tensor:
    """At most `count` vectors of W, evenly spread, each row divided by its root mean square: fp32 [<= count, d]."""
    x = (W / W.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)).reshape(-1, d)
    count = min(count, len(x))
    # Not every so-manieth: a step that divides the length of a row would meet the same few columns in all rows.
    return x[torch.arange(count, device=x.device) * (len(x) - 1) // max(1, count - 1)]
