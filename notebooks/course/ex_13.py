"""Checks of notebook 13: decoding with overlap, a step of the Viterbi algorithm, the folded inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lcqat_min.codebook.digits import digits_of
from lcqat_min.codebook.trellis import banded

from .exercise import Wrong, exercise, expect_close

ROUND_TAPS = torch.tensor([[0.75, 0.45], [0.4, -0.5]])  # those of the notebook


def _random(n: int, reach: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bits [n, 2], taps [reach + 1, 2], and the banded A [n, 2 n] of the row."""
    generator = torch.Generator().manual_seed(seed)
    bits = digits_of(torch.randint(4, (n,), generator=generator), 2, 2)
    taps = torch.randn(reach + 1, 2, generator=generator)
    return bits, taps, banded(taps[:, None], n)[: 2 * n].T


@exercise
def decode_overlap(answer: Callable) -> None:
    one = torch.tensor([[1.0, -1.0]])
    expect_close(answer(one, ROUND_TAPS), [0.3], "the only weight of a row (behind it there are no bits)")
    bits = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    expect_close(answer(bits, ROUND_TAPS)[1:], [-1.2], "the last weight of two, which has only its own bits,")
    expect_close(answer(bits, ROUND_TAPS)[:1], [0.4], "the first weight of two (0.75 - 0.45 - 0.4 + 0.5)")
    for reach in (0, 1, 3):
        bits, taps, A = _random(9, reach, seed=131 + reach)
        expect_close(answer(bits, taps), A @ bits.flatten(), f"a row of 9 weights with reach {reach}")
    bits, taps, A = _random(2, 4, seed=139)
    expect_close(answer(bits, taps), A @ bits.flatten(), "a row of 2 weights with reach 4, longer than the row,")


@exercise
def viterbi_step(answer: Callable) -> None:
    generator = torch.Generator().manual_seed(135)
    for turn in range(4):
        taps = ROUND_TAPS if turn == 0 else torch.randn(2, 2, generator=generator)
        cost = torch.zeros(4) if turn == 0 else 2 * torch.rand(4, generator=generator)
        w = 0.3 if turn == 0 else 1.5 * torch.randn((), generator=generator).item()
        got = answer(cost.clone(), w, taps)
        if not isinstance(got, tuple) or len(got) != 2:
            raise Wrong("Return two tensors: the new costs, and the states that they came from.")
        ways = {}  # (own, later) -> cost of that way
        for own in range(4):
            for later in range(4):
                own_bits, later_bits = (digits_of(torch.tensor(state), 2, 2) for state in (own, later))
                value = (own_bits * taps[0]).sum() + (later_bits * taps[1]).sum()
                ways[own, later] = (cost[later] + (w - value) ** 2).item()
        wanted = torch.tensor([min(ways[own, later] for later in range(4)) for own in range(4)])
        where = "with the notebook's taps, w = 0.3 and all costs 0" if turn == 0 else "with random taps and costs"
        expect_close(got[0], wanted, f"the new cost {where}")
        if not isinstance(got[1], torch.Tensor) or got[1].shape != (4,) or got[1].is_floating_point():
            raise Wrong("The second result must be the number of a state for each state: int64 [4].")
        for own, later in enumerate(got[1].tolist()):
            if later not in range(4) or ways[own, later] > wanted[own] + 1e-4:
                raise Wrong(
                    f"The costs are right, but the best way into state {own} does not come from state {later} {where}."
                )


@exercise
def fold_overlap(answer: Callable) -> None:
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    got = answer(x.clone(), ROUND_TAPS)
    if not isinstance(got, torch.Tensor) or got.shape != (2, 3, 2):
        raise Wrong(f"The result must have shape [2, 3, 2] here, not {list(getattr(got, 'shape', []))}.")
    last = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.75, 0.45]])
    expect_close(got[1], last, "with only the last input not zero (it meets no later bits),")
    first = torch.tensor([[0.75, 0.45], [0.4, -0.5], [0.0, 0.0]])
    expect_close(got[0], first, "with only the first input not zero (weight 1 depends on the bits of weights 1 and 2),")
    for n, reach in ((7, 0), (7, 1), (7, 3), (2, 4)):
        bits, taps, A = _random(n, reach, seed=141 + reach)
        x = torch.randn(5, n, generator=torch.Generator().manual_seed(n))
        got = answer(x.clone(), taps)
        expect_close(got, (x @ A).view(5, n, 2), f"A^T x for {n} inputs and reach {reach}")
        products = (got * bits).sum((1, 2))
        expect_close(products, x @ (A @ bits.flatten()), f"the product with the bits, reach {reach},")
