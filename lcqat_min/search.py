"""Nearest codeword: encoding for codebooks whose A is not orthogonal.

    index = argmin_i | M_g^T (x - w_i) |^2        w_i = A q_i; M_g: a factor of the error's weight, or none

Scalar grids are rounded; everything else is a search. With G = M M^T the square is |M^T x|^2 - 2 <G w_i, x> +
<G w_i, w_i>, so a search is one product of all codewords with all vectors, and an argmax:

    up to 8 bits   exact. A codebook without its offset b holds -w for each w, and |x - w|^2 and |x + w|^2 differ in
                   the sign of one term: 128 scores serve 256 codewords.
    above          by halves: x = A1 q1 + A2 q2 + error. A shortlist of first halves, then the best second half
                   for each of them, exactly.

Rounding with feedback searches once for each group g of d columns, with a metric of its own: so each function here
prepares a `Search` for metrics [G, d, d] (None: plain distance), called as search(x, g) with the vectors as columns,
x fp32 [d, N] -> index int64 [N]. Every step of it runs over N numbers that lie side by side.

Gives up: above 8 bits the result is near the best, not always the best.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .constants import made_once
from .digits import digits_of

Search = Callable[[Tensor, int], Tensor]
SCORES_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 26}  # fp32 held at a time: what a core caches; 256 MiB
SHORTLIST = 16  # first halves kept in a search by halves


def nearest_level(step: float, offset: float, levels: int) -> Search:
    """One digit a weight, w = step * q + offset: the search is a rounding, whatever the metric."""
    per_step = 1 / step if step else 0.0  # a codebook that was fitted to zeros: any digit will do
    zero = torch.tensor((levels - 1) / 2 - offset * per_step, dtype=torch.float32)
    return lambda x, g: torch.add(zero, x[0], alpha=per_step).round_().clamp_(0, levels - 1).long()


def nearest(words: Tensor, metrics: Tensor | None) -> Search:
    """Exact search of any codewords [K, d]."""
    weighted, half_norm = _weighted(words, metrics)

    def search(x: Tensor, g: int) -> Tensor:
        return _in_chunks(x, len(words), lambda part: _argmax((weighted[g] @ part).sub_(half_norm[g])).long())

    return search


def nearest_symmetric(words: Tensor, metrics: Tensor | None) -> Search:
    """Exact search of a codebook that holds -w for each w: as in `nearest`, with half of the scores.

    words [K/2, d]: the upper half of the indices; the codeword of index i is minus that of index K - 1 - i.
    """
    half = len(words)
    weighted, half_norm = _weighted(words, metrics)
    columns = weighted.mT.contiguous().unbind()
    weighted, half_norm = weighted.unbind(), half_norm.unbind()  # indexing a list is faster than indexing a tensor

    def search(x: Tensor, g: int) -> Tensor:
        def search_part(part: Tensor) -> Tensor:
            best = _argmax((weighted[g] @ part).abs_().sub_(half_norm[g]))
            inner = (columns[g].index_select(1, best.int()) * part).sum(0)
            return best.add_(0.5).copysign_(inner).add_(half - 0.5).long()

        return _in_chunks(x, half, search_part)

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
    digits2 = upper_half(A.shape[1] - half, levels, A.device)

    def search(x: Tensor, g: int) -> Tensor:
        M = torch.eye(len(A), device=A.device) if metrics is None else metrics[g]
        A1, A2 = (M.T @ A).split([half, A.shape[1] - half], dim=1)  # measure in the metric: move vectors and
        words1, likely, likely_norm, whiten = _shortlist(A1, A2, digits1)  # codebook alike
        second_half = nearest_symmetric(digits2 @ A2.T, None)

        def search_part(part: Tensor) -> Tensor:
            moved = part.T @ M
            scores = torch.addmm(-likely_norm, moved @ whiten, likely.T)
            first = scores.topk(min(SHORTLIST, len(likely)), dim=1).indices
            rest = moved[:, None] - words1[first]  # [N, SHORTLIST, d]
            second = second_half(rest.flatten(0, 1).T.contiguous(), 0).view(first.shape)
            error = rest - digits_of(second, A2.shape[1], levels) @ A2.T
            best = error.square().sum(2).argmin(1, keepdim=True)
            return ((first << bits2) + second).gather(1, best).squeeze(1)

        return _in_chunks(x, SHORTLIST * len(digits2), search_part)

    return search


def _shortlist(A1: Tensor, A2: Tensor, digits1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codewords of the first half, plain and whitened by the noise of the second; half norms; the whitening."""
    noise = A2 @ A2.T
    floor = (0.03 * noise.diagonal().mean()).clamp(min=1e-12)  # A2 need not have full rank, and may be zero
    noise = noise + floor * torch.eye(len(A1), device=A1.device)
    whiten = torch.linalg.cholesky(torch.linalg.inv(noise))
    words1 = digits1 @ A1.T
    likely = words1 @ whiten
    return words1, likely, likely.square().sum(1) / 2, whiten


def _weighted(words: Tensor, metrics: Tensor | None) -> tuple[Tensor, Tensor]:
    """words [K, d] in each metric: G_g w, fp32 [G, K, d], and half of w^T G_g w, fp32 [G, K, 1]."""
    weighted = words[None] if metrics is None else words @ (metrics @ metrics.mT)
    return weighted, (weighted * words).sum(2, keepdim=True) / 2


@made_once
def upper_half(count: int, levels: int, device: torch.device) -> Tensor:
    """Digits of the upper half of all indices, fp32 [levels^count / 2, count]; the rest: negatives."""
    size = levels**count
    return digits_of(torch.arange(size // 2, size, device=device), count, levels)


@made_once
def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.float32, device=device)[:, None]


def _argmax(scores: Tensor) -> Tensor:
    """scores.argmax(0) as fp32, ties to the largest index; overwrites fp32 scores [K, N].

    On CPUs torch's argmax and its boolean tensors are not vectorised; float compare, multiply and amax are: 4
    times faster. Places are exact in fp32 up to 2^24.
    """
    is_best = torch.ge(scores, scores.amax(0), out=scores)
    return is_best.mul_(_places(len(scores), scores.device)).amax(0)


def _in_chunks(x: Tensor, words: int, search: Callable[[Tensor], Tensor]) -> Tensor:
    """`search` over parts of x [d, N] for which `words` scores a vector fit into SCORES_AT_ONCE."""
    vectors = max(1, SCORES_AT_ONCE.get(x.device.type, 1 << 18) // words)
    return torch.cat([search(part) for part in x.split(vectors, 1)]) if x.shape[1] > vectors else search(x)
