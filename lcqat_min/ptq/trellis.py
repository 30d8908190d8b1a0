"""Trellis: LC-QAT's method with a codebook as long as the row. Vectors overlap, and rounding looks ahead.

    1  random signs and a block-Hadamard rotation, as in ptq/lcqat.py
    2  taps fitted to N(0, 1) weights                                          codebook/trellis_taps.py
    3  codes by the Viterbi algorithm with error feedback, at the best of a few scales per row        ptq/viterbi.py
    4  taps refitted to the layer's outputs, and codes again at scales nearby, as long as that lowers the proxy loss
    5  latents that round to the codes and keep the margin to the next one     layer/trellis.py

Plain decisions, vector by vector, are a candidate at the scale that the search found best; so it never loses to them.

Limits: bits per weight as in TAPS. No sweeps: after a search that looks ahead they gained 1 % of the proxy loss at
reach 3 and up to 3 % at reach 1 (lesson 13).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ..codebook.matrix import CodedMatrix
from ..codebook.trellis import TrellisCodebook
from ..codebook.trellis_taps import TAPS
from ..errors import UsageError
from ..layer.surrogate import ESTIMATORS
from ..layer.trellis import TrellisLinear
from .ldlq import Rounded, better_rows, proxy_loss, refit, row_scales
from .method import Method
from .moments import Factor
from .viterbi import plain_decisions, viterbi_round

SCALES = (0.9, 1.0, 1.1, 1.3)  # of a row's root mean square: the first round of candidates
NEARBY = (0.95, 1.05)


@dataclass(frozen=True, kw_only=True)
class Trellis(Method):
    """bits           per weight: 1, 1.5, 2, 2.5, 3 or 4
    dim            d, weights per vector; 0: as few as the bits allow, 1 or 2
    reach          how many later vectors a vector depends on; -1: as many as make at most 64 states
    estimator      gradient through the rounding: ste | clipped | dge
    learn_codebook train the taps
    start_on_codes latents start on the codes, not at the unrounded targets
    sweeps         none
    """

    bits: float = 2.0
    dim: int = 0
    reach: int = -1
    estimator: str = "ste"
    learn_codebook: bool = True
    start_on_codes: bool = False
    sweeps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("estimator", ESTIMATORS)
        if self.sweeps:
            raise UsageError(f"Trellis.sweeps is {self.sweeps}; its search looks ahead instead: leave it at 0")
        self.start_taps()

    def start_taps(self) -> TrellisCodebook:
        """The codebook that the fit to a matrix starts from. UsageError where there is none for these settings."""
        dim = self.dim or (1 if self.bits == int(self.bits) else 2)
        m = round(self.bits * dim)
        reach = max(1, 6 // max(1, m)) if self.reach < 0 else self.reach
        if m != self.bits * dim or (m, dim, reach) not in TAPS:
            known = ", ".join(f"({m / d:g}, {d}, {L})" for m, d, L in sorted(TAPS))
            got = f"Trellis has no taps for bits {self.bits}, dim {dim} and reach {reach}"
            raise UsageError(f"{got}; choose (bits, dim, reach) from {known}, or run scripts/find_filters.py")
        return TrellisCodebook(torch.tensor(TAPS[m, dim, reach], dtype=torch.float32))

    def layer(self, W: Tensor, H: Tensor, bias: Tensor | None, generator: torch.Generator) -> TrellisLinear:
        """As in Method."""
        signs, book = self.signs(W, generator), self.start_taps().to(W.device)
        W_r, factor = self.prepare(W, H, signs, book.dim)
        rounded = self.round_rows(W_r, factor, book)
        target = None if self.start_on_codes else rounded.target
        return TrellisLinear(rounded.coded, W.shape[1], bias, signs, target, self.estimator, self.learn_codebook)

    def round_rows(self, W: Tensor, factor: Factor, book: TrellisCodebook) -> Rounded:
        """Codes for a W and a factor that are prepared."""
        used = factor if self.feedback else None
        best = _best(W, row_scales(W, SCALES), book, factor.H, used)
        for _ in range(self.refits):
            book = refit(W, best.coded, factor.H)
            other = _best(W, [near * best.coded.scale for near in (1.0, *NEARBY)], book, factor.H, used)
            if other.loss.sum() >= best.loss.sum():
                break
            best = other
        plain = _scored(W, best.coded.scale, best.coded.codebook, factor.H, plain_decisions, used)
        return better_rows(best, plain)


def _best(W: Tensor, scales: Iterable[Tensor], book: TrellisCodebook, H: Tensor, factor: Factor | None) -> Rounded:
    return reduce(better_rows, (_scored(W, scale, book, H, viterbi_round, factor) for scale in scales))


def _scored(W: Tensor, scale: Tensor, book: TrellisCodebook, H: Tensor, way, factor: Factor | None) -> Rounded:
    index, target = way(W, scale, book, factor)
    coded = CodedMatrix(book, index, scale)
    return Rounded(coded, target, proxy_loss(coded.weight() - W, H))
