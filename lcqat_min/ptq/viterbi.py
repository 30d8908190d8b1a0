"""Rounding to a trellis: the Viterbi algorithm, in which every state carries the errors of its own path.

A vector w_g = sum_l A_l c_{g+l} depends on its own bits c_g and on the state, the bits of the vectors after it
(codebook/trellis.py). So the search goes from the last vector to the first. For each state it keeps the best path that
ends there:

    cost(state')  = min over the states before it of  cost(state) + | M_g^T (t_g - w_g) |^2
    t_g           = W_g + sum_{j>g} e_j L_jg          e_j = W_j - w_j: what rounding with feedback carries (ptq/ldlq.py)

The errors e_j belong to a path, so each state has a target of its own ("per-survivor processing" in the literature of
equalizers). Two states that differ only in the bits that leave the window lead to the same one; the better stays.

The paths to all states agree on what lies some tens of vectors back. So after each block of vectors the oldest one is
decided, except the newest UNDECIDED blocks: as it is on the best path, and paths that differ there are dropped. Decided
errors are one number per row, and almost all of the feedback is a product of matrices as in ptq/ldlq.py. Rows are taken
in chunks of about STATES states, so memory does not depend on the height of W.

Tensors here have the rows of W last, which makes every step an operation on long contiguous vectors.

Limits: with feedback the best path is not found for certain, since a path that is dropped might have carried better
errors; without feedback it is, up to what more UNDECIDED blocks would change (a tenth of a percent).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codebook.search import nearest
from ..codebook.trellis import TrellisCodebook
from .ldlq import feedback_of
from .moments import Factor

BLOCK, UNDECIDED = 8, 6  # vectors in a block; blocks
STATES = {"cpu": 1 << 14, "cuda": 1 << 22}  # rows times states at a time


def viterbi_round(W: Tensor, scale: Tensor, book: TrellisCodebook, factor: Factor | None) -> tuple[Tensor, Tensor]:
    """W [out, n] to the trellis, with feedback if there is a factor: scale [out] -> index [out, n/d], target [out, n].

    target: what each vector was rounded from, in units of the row scale, on the path that was chosen.
    """
    if book.reach == 0:
        book = TrellisCodebook(F.pad(book.taps, (0, 0, 0, 0, 0, 1)))  # a state, though nothing depends on it
    L, metrics = _feedback(W, book.dim, factor)
    x = (W / scale[:, None]).T.contiguous()  # [n, out]
    at_once = max(1, STATES.get(W.device.type, 1 << 18) >> book.bits * book.reach)
    parts = _each(lambda part: _Search(book, part.shape[1], L, metrics).run(part), x.split(at_once, 1))
    index, error = (torch.cat(found, dim=1).T.contiguous() for found in zip(*parts, strict=True))
    index = index.long()
    return index, book.decode(index).flatten(1) + error @ L.T


def _each(search: Callable[[Tensor], tuple[Tensor, Tensor]], parts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The search of each part, on CPUs in as many threads as torch has.

    Steps are too small to be shared between threads: they would mostly wait for each other.
    """
    threads = torch.get_num_threads()
    if threads == 1 or parts[0].device.type != "cpu":
        return [search(part) for part in parts]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(search, parts))
    finally:
        torch.set_num_threads(threads)


def plain_decisions(W: Tensor, scale: Tensor, book: TrellisCodebook, factor: Factor | None) -> tuple[Tensor, Tensor]:
    """As viterbi_round, but without looking ahead: from the last vector to the first, each takes the bits that serve it
    best. It takes about as long as rounding to any codebook of m bits.
    """
    (n, d), x = (W.shape[1], book.dim), (W / scale[:, None]).T
    L, metrics = _feedback(W, d, factor)
    own = book.digits(torch.arange(1 << book.bits, device=W.device)) @ book.taps[0].T
    search, error, target = nearest(own, metrics), torch.zeros_like(x), torch.empty_like(x)
    index = torch.zeros(n // d + book.reach, len(W), dtype=torch.long, device=W.device)
    for g in range(n // d - 1, -1, -1):
        vector, known = slice(g * d, (g + 1) * d), min(n // d - 1 - g, book.reach)
        ahead = book.digits(index[g + 1 : g + 1 + known].T)  # [out, known, m]
        later = torch.einsum("olm,ldm->do", ahead, book.taps[1 : 1 + known])
        target[vector] = x[vector] + L[vector, vector.stop :] @ error[vector.stop :]
        index[g] = search(target[vector] - later, g)
        error[vector] = x[vector] - later - own.T[:, index[g]]
    return index[: n // d].T.contiguous(), target.T


def _feedback(W: Tensor, d: int, factor: Factor | None) -> tuple[Tensor, Tensor]:
    """Feedback [n, n] and metrics [n/d, d, d] (ptq/ldlq.py); without a factor none, and plain distance."""
    n = W.shape[1]
    return (torch.eye(n).to(W), torch.eye(d).to(W).expand(n // d, d, d)) if factor is None else feedback_of(factor.C, d)


class _Block(NamedTuple):
    """Vectors that are not decided yet, as the path to each place has them. A place is state * rows + row.

    before: for each vector, the highest first, the place before it on the path to each place after it, int32
    [states * rows]. origin: the same for all vectors of the block together.
    """

    before: list[Tensor]
    origin: Tensor


class _Search:
    """The search in `rows` rows, with feedback L [n, n] and metrics [n / d, d, d] (ptq/ldlq.py).

    The largest results of a step are written where those of the one before were: new memory for each would cost about
    as much as the step itself (page faults).
    """

    def __init__(self, book: TrellisCodebook, rows: int, L: Tensor, metrics: Tensor):
        self.d, self.L, self.metrics = book.dim, L, metrics
        self.branches, self.states = 1 << book.bits, 1 << book.bits * book.reach
        self.shift = book.bits * (book.reach - 1)  # a state begins with the bits of the vector that was last
        self.later = [book.window_values(known).T[:, :, None] for known in range(book.reach + 1)]
        self.own = book.taps[0] @ book.digits(torch.arange(self.branches, device=L.device)).T  # [d, branches]
        self.rows = torch.arange(rows, dtype=torch.int32, device=L.device)
        self.places = torch.arange(self.states * rows, dtype=torch.int32, device=L.device)
        self.way = torch.arange(self.branches, dtype=torch.int32, device=L.device)[:, None]
        self.total, self.difference = L.new_empty(2, self.branches, self.states, rows)
        self.kept = L.new_empty(2, BLOCK * self.d, len(self.places))
        self.carried = L.new_empty(2, (UNDECIDED + 1) * BLOCK * self.d, len(self.places))

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, rows] -> index [n / d, rows], error [n, rows]."""
        d, L, vectors = self.d, self.L, len(self.metrics)
        index, error = self.places.new_empty(vectors, x.shape[1]), torch.zeros_like(x)
        cost = x.new_full((self.states, x.shape[1]), torch.inf)
        cost[0] = 0  # after the last vector there are no bits, so one state
        carried = x.new_empty(0, len(self.places))  # errors of undecided vectors on the path to each place
        blocks: list[_Block] = []
        for end in range(vectors, 0, -BLOCK):
            start = max(0, end - BLOCK)
            columns, decided = slice(start * d, end * d), end * d + len(carried)
            target = torch.addmm(x[columns], L[columns, decided:], error[decided:])
            target = target.repeat(1, self.states).addmm_(L[columns, end * d : decided], carried)
            cost, errors, block = self._advance(cost, x[columns], target, start)
            before, carried = carried, self.carried[end // BLOCK % 2, : len(errors) + len(carried)]
            carried[: len(errors)] = errors
            torch.index_select(before, 1, block.origin, out=carried[len(errors) :])
            blocks.append(block)
            while len(blocks) > (UNDECIDED if start else 0):
                high = start + len(carried) // d
                low = high - len(blocks[0].before)
                cost, best, index[low:high] = self._decide(cost, blocks)
                error[low * d : high * d] = carried[(low - start) * d :, best]
                carried = carried[: (low - start) * d]
        return index, error

    def _advance(self, cost: Tensor, x: Tensor, target: Tensor, start: int) -> tuple[Tensor, Tensor, _Block]:
        """The vectors from `start` on, with targets [vectors * d, places]: new costs, errors as targets, the block."""
        d, before, origin, last = self.d, [], self.places, len(self.metrics) - 1
        L, (errors, spare) = self.L[start * d :, start * d : start * d + len(target)], self.kept[:, :0]
        for low in range(len(target) - d, -1, -d):
            g, vector, later = start + low // d, slice(low, low + d), slice(low + d, None)
            t = target[vector].index_select(1, origin).addmm_(L[vector, later], errors)
            later_bits = self.later[min(last - g, len(self.later) - 1)]
            t.view(d, self.states, -1).sub_(later_bits)
            M = self.metrics[g].T
            cost, place = self._best_ways(cost, M @ t, M @ self.own)
            origin = origin.index_select(0, place)
            before.append(place)
            errors, spare = self.kept[len(before) % 2, low - len(target) :], errors
            torch.index_select(spare, 1, place, out=errors[d:])
            gap = (x[vector][:, None] - later_bits).flatten(1).index_select(1, place).view(d, self.branches, -1)
            torch.sub(gap, self.own[:, :, None], out=errors[:d].view_as(gap))
        return cost, errors, _Block(before, origin)

    def _best_ways(self, cost: Tensor, t: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """The best way to each new state: its cost [states, rows], and the place that it comes from, int32 [places].

        t [d, places]: what the own bits of the vector should add. own [d, branches]: what they can add.
        """
        total = cost
        for t_i, own_i in zip(t.view(-1, *cost.shape), own, strict=True):
            torch.sub(t_i, own_i[:, None, None], out=self.difference)
            total = torch.addcmul(total, self.difference, self.difference, out=self.total)
        # Ways that differ in the oldest bits of the state meet. The number of the way goes into the lowest bits of its
        # cost, which is not negative, so that one minimum over integers finds both: argmin is many times slower.
        ranked = total.view(torch.int32).bitwise_and_(-self.branches)
        ranked = ranked.view(self.branches, -1, self.branches, cost.shape[1]).bitwise_or_(self.way)
        best = ranked.amin(2)
        way = best & self.branches - 1
        first = self.places.view(-1, self.branches, cost.shape[1])[:, 0]
        place = torch.add(first, way, alpha=cost.shape[1]).flatten()
        return (best - way).view(torch.float32).view_as(cost), place

    def _decide(self, cost: Tensor, blocks: list[_Block]) -> tuple[Tensor, Tensor, Tensor]:
        """Take the oldest of `blocks` away, as the best path has it.

        The costs, infinite for paths that have it otherwise; the place that the best path of each row leads to, [rows];
        the index of each vector of the block, lowest first, [vectors, rows].
        """
        least, oldest, after = cost.min(0), blocks.pop(0), self.places
        for block in reversed(blocks):
            after = block.origin.index_select(0, after)  # in the end: the place after the oldest block on each path
        best = least.indices.int() * cost.shape[1] + self.rows
        place, places = after[best], []
        cost = torch.where(after.view_as(cost) == place, cost - least.values, torch.inf)
        for before in reversed(oldest.before):
            places.append(place)
            place = before[place]
        return cost, best, torch.stack(places) // cost.shape[1] >> self.shift
