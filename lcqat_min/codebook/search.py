"""Nearest codeword: encoding for codebooks whose A is not orthogonal.

    index = argmin_i | M_g^T (x - w_i) |^2        w_i: a codeword; M_g: a factor of the error's weight, or none

Scalar grids are rounded; everything else is a search. With G = M M^T the square is

    | M^T (x - w) |^2 = x^T G x - 2 ( <G w, x> - <G w, w> / 2 )

and the first term is the same for all codewords: the nearest one has the largest score [G w, -<G w, w> / 2] . [x, 1].

    up to 8 bits   exact: all scores in one matrix product, and an argmax.
    above          by halves: x = A1 q1 + A2 q2 + error. A shortlist of first halves, then the best second half
                   for each of them, exactly.

Rounding with feedback searches once for each group g of d columns, with a metric of its own: so each function here
prepares a `Search` for metrics [G, d, d] (None: plain distance), called as search(x, g) with the vectors as columns,
x fp32 [d, N] -> index int64 [N].

Limits: above 8 bits the result is near the best, not always the best.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .digits import digits_of

Search = Callable[[Tensor, int], Tensor]
SCORES_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 26}  # fp32 held at a time: what a core caches; 256 MiB
SHORTLIST = 16  # first halves kept in a search by halves
try:  # its argmax is vectorised; torch's on CPUs is not
    NUMPY = torch.empty(0, dtype=torch.float32, device="cpu").numpy() is not None
except RuntimeError:  # not installed, or not the version that this torch was built for
    NUMPY = False


def nearest_level(step: float, offset: float, levels: int) -> Search:
    """One digit per weight, w = step * q + offset: the search is a rounding, whatever the metric."""
    per_step = 1 / step if step else 0.0  # a codebook that was fitted to zeros: any digit will do
    zero = torch.tensor((levels - 1) / 2 - offset * per_step, dtype=torch.float32)
    return lambda x, g: torch.add(zero, x[0], alpha=per_step).round_().clamp_(0, levels - 1).long()


def nearest(words: Tensor, metrics: Tensor | None) -> Search:
    """Exact search of any codewords [K, d]."""
    words = words.detach()  # an index has no slope
    weighted = words.T[None] if metrics is None else metrics @ metrics.mT @ words.T  # G_g w: [G, d, K]
    half_norms = (weighted * words.T).sum(1, keepdim=True) / 2
    scorers = torch.cat([weighted, -half_norms], dim=1).unbind()  # [d + 1, K] for each metric

    def search(x: Tensor, g: int) -> Tensor:
        lifted = torch.cat([x.detach(), x.new_ones(1, x.shape[1])]).T
        found = []
        for part in lifted.split(_at_once(len(words), words.device)):
            scores = part @ scorers[g]
            on_cpu = NUMPY and scores.device.type == "cpu"
            found.append(torch.as_tensor((scores.numpy() if on_cpu else scores).argmax(1)))
        return torch.cat(found)

    return search


def nearest_by_halves(A: Tensor, levels: int, metrics: Tensor | None) -> Search:
    """Search over too many codewords to list (16 bits: 65 536): A [d, k].

    While q2 is unknown, A2 q2 is noise of covariance A2 A2^T; the SHORTLIST halves q1 that are likeliest under
    that noise are kept. On normal vectors and fitted planes of 16 bits the error is 0.2 to 0.6 % above that of
    listing all codewords, 1 to 2 % in a metric of correlated inputs, at a twentieth of the time.
    """
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
            moved = part.T @ M
            scores = torch.addmm(-likely_norm, moved @ whiten, likely.T)
            first = scores.topk(min(SHORTLIST, len(likely)), dim=1).indices
            rest = moved[:, None] - words1[first]  # [N, SHORTLIST, d]
            second = second_half(rest.flatten(0, 1).T, 0).view(first.shape)
            error = rest - digits_of(second, A2.shape[1], levels) @ A2.T
            best = error.square().sum(2).argmin(1, keepdim=True)
            return ((first << bits2) + second).gather(1, best).squeeze(1)

        return torch.cat([search_part(part) for part in x.split(_at_once(len(digits2), x.device), 1)])

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


def _at_once(scores: int, device: torch.device) -> int:
    """How many vectors to search at a time, with so many scores for each."""
    return max(1, SCORES_AT_ONCE.get(device.type, 1 << 18) // scores)
