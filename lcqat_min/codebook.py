"""Codebooks of 2 bits a weight: one formula, and the lookup table that it replaces.

A codebook turns an m-bit index into a vector of d weights. At 2 bits a weight m = 2 d.

    affine   w_hat = A q + b     A [d, k], b [d], q in Q^k   (LC-QAT, arXiv 2606.10531; UniSVQ, 2606.10520)
    table    w_hat = T[index]    T [2^m, d]                  (k-means, LBG; what AQLM and GPTVQ store)

`q` holds k digits of L levels each, centred at zero. Three affine codebooks differ in A and L alone. The mean
squared error (MSE) is that of fresh weights, drawn like those of the fit; tests/test_codebook.py measures it.

    name          d   k   L   digits                 learned numbers   MSE on N(0,1)
    scalar        1   1   4   -1.5 -0.5 +0.5 +1.5       2               0.119
    tied planes   4   4   4   the same                 20               0.119    the paper's, z = q + 1.5
    untied planes 4   8   2   -1 +1                    36               0.101    our idea
    untied planes 8  16   2   -1 +1                   136               0.092
    free table    4   -   -   none: a lookup         1024               0.099

Why the names: a digit of four levels is two bits, q = hi + lo/2 with hi, lo in {-1, +1}, so the paper's
codebook is [A, A/2] applied to two bit-planes: the low plane is *tied* to half of the high plane. All its
codewords form a sheared cube. Shear can pack space more densely (the lattice D4 is a sheared cube), but it
also drives the corners out to where hardly any weight lies, and at four levels a side that costs what the
packing gains: on independent normal weights the fitted A is close to orthogonal, whatever the start, and that
is scalar rounding in a turned basis. *Untie* the planes (let A be d x 2d) and the same bits reach a codebook
that is shaped like the data. It still has no table: decoding is one tiny matrix product, differentiable in A,
b and q.

Index layout (shared with packing and kernels): digits big-endian, so digit 0 sits in the highest bits. For
d = 4 at 2 bits the index is one byte. Negating every digit maps index i to 2^m - 1 - i; the search uses that.

Gives up: encoding is a search (exact up to 8 bits, by halves above), since A is not orthogonal.
Scales are not part of a codebook: it serves weights of about unit variance, the layer keeps the scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

SCORES_AT_ONCE = 1 << 22  # search scores held in memory at a time: 16 MiB of fp32, about what a CPU caches
EXACT_BITS = 8  # up to 256 codewords are searched one by one
SHORTLIST = 16  # first halves kept in a search over more
MOMENTUM = 0.9  # of the alternating fit


@dataclass(frozen=True)
class AffineCodebook:
    """w_hat = A q + b.  A: fp32 [d, k]; b: fp32 [d]; levels: 2 (bit-planes) or 4 (the paper's lattice)."""

    A: Tensor
    b: Tensor
    levels: int

    @property
    def dim(self) -> int:
        """d, weights in a vector."""
        return self.A.shape[0]

    @property
    def bits(self) -> int:
        """m, bits of an index."""
        return self.A.shape[1] * (self.levels.bit_length() - 1)

    def numbers(self) -> int:
        """How many learned numbers the codebook stores."""
        return self.A.numel() + self.b.numel()

    def decode(self, index: Tensor) -> Tensor:
        """Index (integers [...]) -> weights, fp32 [..., d]."""
        return digits_of(index, self.A.shape[1], self.levels) @ self.A.T + self.b

    def codewords(self) -> Tensor:
        """All 2^m codewords in index order, fp32 [2^m, d]."""
        return self.decode(torch.arange(1 << self.bits, device=self.A.device))

    def encode(self, x: Tensor, metric: Tensor | None = None) -> Tensor:
        """Nearest codeword: x [N, d] -> int64 index [N].

        metric: [d, d], a factor M of the error's weight; minimises |M^T (x - w_hat)|^2. None: plain distance.
        Exact up to 8 bits; above, a search over halves whose error is 0.2 to 2 % above the exact one.
        """
        x, A = (x - self.b), self.A
        if self.dim == self.A.shape[1] == 1:  # one digit: the search is a rounding
            top = self.levels - 1
            places = (x / A).nan_to_num_()  # 0 / 0 in a codebook that was fitted to zeros: any digit will do
            return (places + top / 2).round_().clamp_(0, top).long().squeeze(1)
        if metric is not None:  # measure in the metric: move vectors and codebook alike
            x, A = x @ metric, metric.T @ A
        if self.bits <= EXACT_BITS:
            return _nearest_symmetric(x, _upper_half(A.shape[1], self.levels, A.device) @ A.T)
        return _nearest_by_halves(x, A, self.levels)

    def as_planes(self) -> AffineCodebook:
        """The same codebook, codeword by codeword and index by index, written with digits of two levels."""
        if self.levels == 2:
            return self
        columns = torch.stack([self.A, self.A / 2], dim=2)  # hi0 lo0 hi1 lo1 ...: the bits keep their order
        return AffineCodebook(columns.flatten(1), self.b, 2)

    def to(self, device: torch.device | str) -> AffineCodebook:
        return replace(self, A=self.A.to(device), b=self.b.to(device))


@dataclass(frozen=True)
class TableCodebook:
    """w_hat = table[index].  table: fp32 [2^m, d]."""

    table: Tensor

    @property
    def dim(self) -> int:
        """d, weights in a vector."""
        return self.table.shape[1]

    @property
    def bits(self) -> int:
        """m, bits of an index."""
        return self.table.shape[0].bit_length() - 1

    def numbers(self) -> int:
        """How many learned numbers the codebook stores."""
        return self.table.numel()

    def decode(self, index: Tensor) -> Tensor:
        """Index (integers [...]) -> weights, fp32 [..., d]."""
        return self.table[index.long()]

    def codewords(self) -> Tensor:
        """All 2^m codewords, fp32 [2^m, d]."""
        return self.table

    def encode(self, x: Tensor, metric: Tensor | None = None) -> Tensor:
        """Nearest codeword, exact: x [N, d] -> int64 index [N]. metric: as in AffineCodebook.encode."""
        words = self.table
        if metric is not None:
            x, words = x @ metric, words @ metric
        half_norm = words.square().sum(1) / 2
        return _in_chunks(x, len(words), lambda part: _argmax(torch.addmm(-half_norm, part, words.T)))

    def to(self, device: torch.device | str) -> TableCodebook:
        return TableCodebook(self.table.to(device))


Codebook = AffineCodebook | TableCodebook


def scalar(step: float = 1.0) -> AffineCodebook:
    """Four uniform levels for one weight: step * {-1.5, -0.5, 0.5, 1.5}."""
    return AffineCodebook(torch.tensor([[float(step)]]), torch.zeros(1), levels=4)


def lattice(dim: int = 4, step: float = 1.0) -> AffineCodebook:
    """The paper's form with A = step * identity: `dim` scalar grids side by side, where tied planes start."""
    return AffineCodebook(step * torch.eye(dim), torch.zeros(dim), levels=4)


def random_planes(dim: int, generator: torch.Generator) -> AffineCodebook:
    """A start for untied planes at 2 bits: planes of scalar grids, jittered so that no two columns align."""
    A = torch.cat([torch.eye(dim), torch.eye(dim) / 2], dim=1)
    jitter = 0.3 * torch.randn(dim, 2 * dim, generator=generator)
    return AffineCodebook(A + jitter, torch.zeros(dim), levels=2)


def digits_of(index: Tensor, count: int, levels: int) -> Tensor:
    """Index (integers [...]) -> centred digits, fp32 [..., count]: -1, +1 (2 levels) or -1.5 ... +1.5 (4)."""
    width = levels.bit_length() - 1
    shifts = torch.arange(count - 1, -1, -1, device=index.device) * width
    q = (index.long().unsqueeze(-1) >> shifts) & (levels - 1)
    return (2 * q - 1).float() if levels == 2 else q.float() - (levels - 1) / 2


def index_of(digits: Tensor, levels: int) -> Tensor:
    """Inverse of digits_of: centred digits [..., count] -> int64 index [...]."""
    width = levels.bit_length() - 1
    q = (digits > 0).long() if levels == 2 else (digits + (levels - 1) / 2).round().long()
    shifts = torch.arange(digits.shape[-1] - 1, -1, -1, device=digits.device) * width
    return (q << shifts).sum(-1)


def fit(x: Tensor, start: Codebook, rounds: int) -> Codebook:
    """Fit a codebook to vectors x [N, d] by alternating search and least squares (Lloyd's algorithm, LBG).

    Affine maps crawl along flat valleys, so each solution but the last two is carried on by MOMENTUM times
    its change since the one before; in 60 rounds that lowers the error of untied planes (d = 4) by 1 to 2 %.
    The best codebook seen is returned, so the result is never worse on x than `start`. In a table, empty
    cells move to the worst-served vectors. Raises ValueError for a wrong shape and for NaN or infinity.
    """
    if x.ndim != 2 or x.shape[1] != start.dim:
        raise ValueError(
            f"fit: vectors have shape {tuple(x.shape)}; the codebook wants [N, {start.dim}]. Reshape them."
        )
    if not torch.isfinite(x).all():
        raise ValueError("fit: the vectors hold NaN or infinity. Check the weights that they come from.")
    book = best = start
    least, solved = math.inf, None
    for step in range(rounds + 1):
        index = book.encode(x)
        error = (x - book.decode(index)).square().mean().item()
        if error < least:
            least, best = error, book
        if isinstance(book, TableCodebook):
            book = _solve_table(x, index, book)
            continue
        previous, solved = solved, _solve_affine(x, index, book)
        book = solved
        if previous is not None and step < rounds - 2:
            book = replace(solved, A=solved.A + MOMENTUM * (solved.A - previous.A))
    return best


def fit_best(x: Tensor, starts: list[Codebook], rounds: int) -> Codebook:
    """`fit` from each start; the one of least mean squared error on x."""
    books = [fit(x, start, rounds) for start in starts]
    return min(books, key=lambda book: mean_squared_error(x, book))


def table_start(x: Tensor, size: int, generator: torch.Generator) -> TableCodebook:
    """k-means start: `size` of the vectors x [N, d], drawn without repetition. ValueError where N < size."""
    if len(x) < size:
        raise ValueError(f"table_start: {len(x)} vectors for a table of {size}. Give more or lower `size`.")
    return TableCodebook(x[torch.randperm(len(x), generator=generator)[:size].to(x.device)].clone())


def mean_squared_error(x: Tensor, book: Codebook) -> float:
    """Mean over the weights of (x - nearest codeword)^2; x [N, d]."""
    return (x - book.decode(book.encode(x))).square().mean().item()


def _solve_affine(x: Tensor, index: Tensor, book: AffineCodebook) -> AffineCodebook:
    """Least-squares (A, b) for given codes; fp64 normal equations, which are only (k + 1) x (k + 1)."""
    k = book.A.shape[1]
    q = torch.cat([digits_of(index, k, book.levels), x.new_ones(len(x), 1)], dim=1).double()
    ridge = 1e-6 * torch.eye(k + 1, dtype=torch.float64, device=x.device)  # a digit may be constant here
    solution = torch.linalg.solve(q.T @ q + ridge, q.T @ x.double()).T.float()
    return replace(book, A=solution[:, :k].contiguous(), b=solution[:, k].contiguous())


def _solve_table(x: Tensor, index: Tensor, book: TableCodebook) -> TableCodebook:
    """The mean of each cell for given codes; empty cells move to the vectors with the largest errors."""
    size = len(book.table)
    count = torch.bincount(index, minlength=size)
    total = torch.zeros_like(book.table).index_add_(0, index, x)
    table = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], book.table)
    dead = (count == 0).nonzero().flatten()
    if len(dead):
        error = (x - book.decode(index)).square().sum(1)
        worst = error.topk(min(len(dead), len(x))).indices
        table[dead[: len(worst)]] = x[worst]
    return TableCodebook(table)


@lru_cache(maxsize=8)
def _upper_half(count: int, levels: int, device: torch.device) -> Tensor:
    """Digits of the upper half of all indices, fp32 [levels^count / 2, count]; the rest: negatives."""
    size = levels**count
    return digits_of(torch.arange(size // 2, size, device=device), count, levels)


def _nearest_symmetric(x: Tensor, words: Tensor) -> Tensor:
    """Exact search of a codebook that holds -w for each w. `words` [K/2, d]: the upper half of the indices.

    |x - w|^2 and |x + w|^2 differ in the sign of <x, w> alone, so one product serves both: half the scores.
    """
    half, half_norm = len(words), words.square().sum(1) / 2

    def search(part: Tensor) -> Tensor:
        inner = part @ words.T
        best = _argmax(inner.abs().sub_(half_norm))
        negative = inner.gather(1, best[:, None]).squeeze(1) < 0
        return torch.where(negative, half - 1 - best, half + best)

    return _in_chunks(x, half, search)


def _nearest_by_halves(x: Tensor, A: Tensor, levels: int) -> Tensor:
    """Search over too many codewords to list (16 bits: 65 536): one half from a shortlist, the other exact.

    Write x = A1 q1 + A2 q2 + error. While q2 is unknown, A2 q2 is noise of covariance A2 A2^T; the SHORTLIST
    halves q1 that are likeliest under that noise are kept, and for each of them the best q2 is found exactly.
    On normal vectors and fitted planes of 16 bits the error is 0.2 to 0.6 % above that of listing all codewords,
    1 to 2 % in a metric of correlated inputs, at a twentieth of the time. (With a shortlist of 32: 0.1 and 0.5 %.)
    """
    half = A.shape[1] // 2
    A1, A2 = A[:, :half], A[:, half:]
    noise = A2 @ A2.T
    floor = (0.03 * noise.diagonal().mean()).clamp(min=1e-12)  # A2 need not have full rank, and may be zero
    noise = noise + floor * torch.eye(len(A), device=A.device)
    whiten = torch.linalg.cholesky(torch.linalg.inv(noise))
    bits1, bits2 = (count * (levels.bit_length() - 1) for count in (half, A2.shape[1]))
    words1 = digits_of(torch.arange(1 << bits1, device=A.device), half, levels) @ A1.T
    words2 = _upper_half(A2.shape[1], levels, A.device) @ A2.T
    likely = words1 @ whiten
    likely_norm = likely.square().sum(1) / 2

    def search(part: Tensor) -> Tensor:
        scores = torch.addmm(-likely_norm, part @ whiten, likely.T)
        first = scores.topk(min(SHORTLIST, len(likely)), dim=1).indices
        rest = part[:, None] - words1[first]  # [N, SHORTLIST, d]
        second = _nearest_symmetric(rest.flatten(0, 1), words2).view(first.shape)
        error = rest - digits_of(second, A2.shape[1], levels) @ A2.T
        best = error.square().sum(2).argmin(1, keepdim=True)
        return ((first << bits2) + second).gather(1, best).squeeze(1)

    return _in_chunks(x, SHORTLIST * len(words2), search)


def _argmax(scores: Tensor) -> Tensor:
    """scores.argmax(1), ties to the largest index; overwrites fp32 scores [N, K].

    On CPUs torch's argmax and its boolean tensors are not vectorised; float compare, multiply and amax are: 4
    times faster. Places are exact in fp32 up to 2^24.
    """
    places = torch.arange(scores.shape[1], dtype=torch.float32, device=scores.device)
    is_best = torch.ge(scores, scores.amax(1, keepdim=True), out=scores)
    return is_best.mul_(places).amax(1).long()


def _in_chunks(x: Tensor, words: int, search: Callable[[Tensor], Tensor]) -> Tensor:
    """`search` over parts of x [N, d] for which `words` scores a vector fit into SCORES_AT_ONCE."""
    rows = max(1, SCORES_AT_ONCE // words)
    return torch.cat([search(part) for part in x.split(rows)]) if len(x) > rows else search(x)
