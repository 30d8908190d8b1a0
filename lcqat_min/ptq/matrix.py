"""One matrix rounded: codes at the best of a few scales per row, then again near them with a better codebook.

    round 0   scales: SCALE_FACTORS times the root mean square of each row
    refits    (A, b) by least squares on the layer's outputs; scales: NEARBY times the best so far

A refit counts only where it lowers the proxy loss of the whole matrix. ptq/ldlq.py rounds at given scales;
ptq/model.py does this for every layer of a model.

Limits: each matrix is rounded by itself, from the second moments of the unquantized model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codebook.matrix import Codebook
from .ldlq import Rounded, refit, round_matrix, row_scales
from .method import Prepared

NEARBY = (0.95, 1.0, 1.05)
FIT_VECTORS = 1 << 14  # weight vectors of a matrix that its codebook is fitted to


def round_layer(
    prepared: Prepared, book: Codebook, feedback: bool = True, refits: int = 1, fitted: bool = False
) -> Rounded:
    """Round prepared.W. fitted: the codebook is affine, and refits may change it."""
    W, factor = prepared.W, prepared.factor
    best = round_matrix(W, factor, book, row_scales(W), feedback)
    for _ in range(refits):
        book = refit(W, best.coded, factor.H) if fitted else book
        other = round_matrix(W, factor, book, [best.coded.scale * near for near in NEARBY], feedback)
        if other.loss.sum() >= best.loss.sum():
            break
        best = other
    return best


def sample_vectors(W: Tensor, dim: int, count: int) -> Tensor:
    """At most `count` vectors of W, evenly spread, each row divided by its root mean square: fp32 [<= count, d]."""
    x = (W / W.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)).reshape(-1, dim)
    count = min(count, len(x))
    # A constant step could divide the length of a row, and then meet the same few columns in all rows.
    return x[torch.arange(count, device=x.device) * (len(x) - 1) // max(1, count - 1)]
