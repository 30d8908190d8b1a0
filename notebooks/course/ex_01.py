"""Checks of notebook 01: the step that clips nothing, bits with a scale per group, the flip that helps most."""

import torch

from .exercise import Wrong, exercise, expect_close


@exercise
def unclipped_step(answer):
    row = torch.tensor([0.3, -2.1, 0.9])
    got = answer(row, 2)
    try:
        plainly_short = abs(float(got) - 0.6) < 1e-4
    except (TypeError, ValueError):
        plainly_short = False
    if plainly_short:
        raise Wrong("For [0.3, -2.1, 0.9] the largest magnitude is 2.1: a large negative weight counts, too.")
    expect_close(got, 1.4, "the step for [0.3, -2.1, 0.9] at 2 bits")
    for bits, step in ((1, 4.2), (3, 0.6), (8, 4.2 / 255)):
        expect_close(answer(row, bits), step, f"the step for [0.3, -2.1, 0.9] at {bits} bits")


@exercise
def grouped_bits(answer):
    got = answer(256, 2, 64)
    if got == 2:
        raise Wrong("You counted the codes alone. Each group also stores a scale of 16 bits.")
    if got == 256 * 2.25:
        raise Wrong("576 is what the whole row of 256 weights takes. Divide by the number of weights.")
    expect_close(got, 2.25, "the bits per weight of 256 inputs at 2 bits, groups of 64")
    expect_close(answer(256, 3, 256), 3.0625, "the bits per weight of 256 inputs at 3 bits, one group")
    expect_close(
        answer(100, 2, 64), 2.32, "the bits per weight of 100 inputs at 2 bits, groups of 64 (a group of 36 remains)"
    )
    expect_close(answer(32, 2, 64), 2.5, "the bits per weight of 32 inputs in groups of 64 (one short group)")


@exercise
def best_flip(answer):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        X = torch.randn(40, 6, generator=generator) + 2 * torch.randn(40, 1, generator=generator)
        H, e = X.T @ X / 40, 0.8 * (torch.rand(6, generator=generator) - 0.5)
        _expect_index(answer(e.clone(), 0.8, H.clone()), _best_by_trying(e, 0.8, H), e, "correlated inputs")
    e = torch.tensor([0.1, -0.2])
    _expect_index(answer(e, 1.0, torch.eye(2)), -1, e, "independent inputs (every weight sits best where it is)")


def _expect_index(got: object, wanted: int, e: torch.Tensor, inputs: str) -> None:
    if not isinstance(got, int | torch.Tensor):
        raise Wrong(f"The result is a {type(got).__name__}; an index, or -1, is wanted.")
    if isinstance(got, torch.Tensor) and got.numel() != 1:
        raise Wrong(f"The result holds {got.numel()} numbers; one index, or -1, is wanted.")
    if wanted == -1 and int(got) != -1:
        raise Wrong(
            f"For e = {[round(v, 2) for v in e.tolist()]} and {inputs}, no move lowers e H e^T: -1 is right; "
            f"you return {int(got)}. Is the change of your best move below zero?"
        )
    if int(got) != wanted:
        raise Wrong(
            f"For e = {[round(v, 2) for v in e.tolist()]} and {inputs}, {wanted} is right; you return "
            f"{int(got)}. Check the formula: 2 m (e H)_j + m^2 H_jj, m of the sign opposite to e_j."
        )


def _best_by_trying(e: torch.Tensor, step: float, H: torch.Tensor) -> int:
    """Make every move and look: the slow, obvious version."""
    losses = []
    for j in range(len(e)):
        moved = e.clone()
        moved[j] += -step if e[j] > 0 else step
        losses.append((moved @ H @ moved).item())
    best = min(range(len(e)), key=losses.__getitem__)
    return best if losses[best] < (e @ H @ e).item() else -1
