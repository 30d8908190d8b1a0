"""Nearest codeword: encoding for codebooks whose A is not orthogonal.

    index = argmin_i | M_g^T (x - w_i) |^2        w_i: a codeword; M_g: a factor of the error's weight, or none

Scalar grids are rounded; everything else is a search. With G = M M^T the square is

    | M^T (x - w) |^2 = x^T G x - 2 ( <G w, x> - <G w, w> / 2 )

and the first term is the same for all codewords: the nearest one has the largest score [G w, -<G w, w> / 2] . [x, 1].

All scores are one matrix product, and the search is its argmax: exact, for up to 8 bits. Above, see
search_by_halves.py.

Rounding with feedback searches once for each group g of d columns, with a metric of its own: so each function here
prepares a `Search` for metrics [G, d, d] (None: plain distance), called as search(x, g) with the vectors as columns,
x fp32 [d, N] -> index int64 [N].

Limits: memory and time grow with the number of codewords, 2^bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Search = Callable[[Tensor, int], Tensor]
SCORES_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 26}  # fp32 held at a time: what a core caches; 256 MiB
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
        parts = lifted.split(at_once(len(words), words.device))
        return torch.cat([_largest(part @ scorers[g]) for part in parts])

    return search


def _largest(scores: Tensor) -> Tensor:
    """Where each row of fp32 [N, K] has its largest number, int64 [N]."""
    on_cpu = NUMPY and scores.device.type == "cpu"
    return torch.as_tensor((scores.numpy() if on_cpu else scores).argmax(1))


def at_once(scores: int, device: torch.device) -> int:
    """How many vectors to search at a time, with so many scores for each."""
    return max(1, SCORES_AT_ONCE.get(device.type, 1 << 18) // scores)
