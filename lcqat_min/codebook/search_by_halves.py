"""The nearest of too many codewords to list, for affine codebooks of more than 8 bits: x = A1 q1 + A2 q2 + error.

A shortlist of first halves q1, then the best second half for each of them, exactly. While q2 is unknown, A2 q2 is noise
of covariance A2 A2^T; the SHORTLIST halves q1 that are likeliest under that noise are kept.

Limits: the result is near the best, not always the best. On normal vectors and fitted planes of 16 bits the error is
0.2 to 0.6 % above that of listing all codewords, 1 to 2 % in a metric of correlated inputs, at a twentieth of the time.
"""

import torch
from torch import Tensor

from .digits import digits_of
from .search import Search, at_once, nearest

SHORTLIST = 16  # first halves kept


def nearest_by_halves(A: Tensor, b: Tensor, levels: int, metrics: Tensor | None) -> Search:
    """Search over too many codewords A q + b to list (16 bits: 65 536): A [d, k], b [d]."""
    half = A.shape[1] // 2
    bits1, bits2 = (count * (levels.bit_length() - 1) for count in (half, A.shape[1] - half))
    digits1 = digits_of(torch.arange(1 << bits1, device=A.device), half, levels)
    digits2 = digits_of(torch.arange(1 << bits2, device=A.device), A.shape[1] - half, levels)

    def search(x: Tensor, g: int) -> Tensor:
        M = torch.eye(len(A), dtype=A.dtype, device=A.device) if metrics is None else metrics[g]
        A1, A2 = (M.T @ A).split([half, A.shape[1] - half], dim=1)  # measure in the metric: move vectors and
        words1, likely, likely_norm, whiten = _shortlist(A1, A2, digits1)  # codebook alike
        second_half = nearest(digits2 @ A2.T, None)

        def search_part(part: Tensor) -> Tensor:
            moved = (part - b[:, None]).T @ M
            scores = torch.addmm(-likely_norm, moved @ whiten, likely.T)
            first = scores.topk(min(SHORTLIST, len(likely)), dim=1).indices
            rest = moved[:, None] - words1[first]  # [N, SHORTLIST, d]
            second = second_half(rest.flatten(0, 1).T, 0).view(first.shape)
            error = rest - digits_of(second, A2.shape[1], levels) @ A2.T
            best = error.square().sum(2).argmin(1, keepdim=True)
            return ((first << bits2) + second).gather(1, best).squeeze(1)

        return torch.cat([search_part(part) for part in x.split(at_once(len(digits2), x.device), 1)])

    return search


def _shortlist(A1: Tensor, A2: Tensor, digits1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codewords of the first half, plain and whitened by the noise of the second; half norms; the whitening."""
    noise = A2 @ A2.T
    floor = (0.03 * noise.diagonal().mean()).clamp(min=1e-12)  # A2 need not have full rank, and may be zero
    noise = noise + floor * torch.eye(len(A1), dtype=A1.dtype, device=A1.device)
    whiten = torch.linalg.cholesky(torch.linalg.inv(noise))
    words1 = digits1 @ A1.T
    likely = words1 @ whiten
    return words1, likely, likely.square().sum(1) / 2, whiten
