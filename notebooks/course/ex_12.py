"""Checks of the exercises in notebook 12."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lcqat_min.layer.rotation import mix

from .exercise import Wrong, exercise, expect_close


@exercise
def gpu_hours(answer: Callable) -> None:
    """10^12 parameters, 3600 tokens, 10^12 operations per second: 6 hours, 8 with a teacher."""
    got = answer(1e12, 3600.0, 1e12, False)
    if got is not None and abs(got - 6 * 3600) < 1:
        raise Wrong("The result is in seconds; an hour has 3600.")
    if got is not None and abs(got - 2) < 1e-6:
        raise Wrong("That is the forward pass alone; the backward pass costs twice as much again.")
    expect_close(got, 6.0, "the time for 1e12 parameters, 3600 tokens and 1e12 operations per second")
    got = answer(1e12, 3600.0, 1e12, True)
    if got is not None and abs(got - 12) < 1e-6:
        raise Wrong("The teacher does not learn: it has a forward pass and no backward pass.")
    expect_close(got, 8.0, "the same time with a teacher")


@exercise
def dense_weight(answer: Callable) -> None:
    """Against the product of explicit matrices, for 4 outputs and 8 inputs."""
    generator = torch.Generator().manual_seed(0)
    decoded = torch.randn(4, 8, generator=generator)
    rows, columns = torch.rand(4, generator=generator) + 0.5, torch.rand(8, generator=generator) + 0.5
    out, inside = torch.tensor([1.0, -1, -1, 1]), torch.tensor([1.0, 1, -1, 1, -1, -1, 1, 1])
    H_out, H_in = mix(torch.eye(4)), mix(torch.eye(8))
    wanted = out[:, None] * (H_out @ (rows[:, None] * decoded) @ H_in) * inside * columns
    got = answer(decoded.clone(), rows, out, inside, columns)
    if got is None or tuple(got.shape) != (4, 8):
        expect_close(got, wanted, "the dense weight")
    mistakes = {
        "The signs of the inputs are missing.": wanted * inside,
        "The signs of the outputs are missing.": wanted * out[:, None],
        "All signs are missing.": wanted * inside * out[:, None],
        "The column scale is missing.": wanted / columns,
        "The row scale acts inside the output rotation: multiply by it before mixing.": out[:, None]
        * rows[:, None]
        * (H_out @ decoded @ H_in)
        * inside
        * columns,
        "Signs come after mixing here: this undoes a rotation, which flipped first and mixed then.": H_out
        @ (out[:, None] * rows[:, None] * decoded * inside)
        @ H_in
        * columns,
        "On the output side, mix first and multiply by the signs then.": H_out
        @ (out[:, None] * rows[:, None] * decoded)
        @ H_in
        * inside
        * columns,
        "On the input side, mix first and multiply by the signs then.": out[:, None]
        * (H_out @ (rows[:, None] * decoded * inside) @ H_in)
        * columns,
    }
    for why, value in mistakes.items():
        if torch.allclose(got, value, atol=1e-5):
            raise Wrong(why)
    expect_close(got, wanted, "the dense weight")


@exercise
def diagnose(answer: Callable) -> None:
    """A curve for each word, and one for each pair of rules that could be taken in the wrong order."""
    nan, inf = float("nan"), float("inf")
    cases = [
        ([0.5, 0.4, 0.3], 0.5, "learning", "falls from 0.5 to 0.3"),
        ([0.5, 0.6, 0.9], 0.5, "diverging", "rises from 0.5 to 0.9"),
        ([0.5, nan, 0.4], 0.5, "diverging", "holds a NaN"),
        ([0.5, inf, 0.4], 0.5, "diverging", "holds an infinity"),
        ([nan, nan], 0.5, "diverging", "is NaN from the start"),
        ([0.001, 0.0011, 0.001], 0.5, "leaking", "starts at 0.001 where 0.5 was measured"),
        ([0.0, 0.0, 0.0], 0.5, "leaking", "is zero throughout"),
        ([0.5, 0.501, 0.499], 0.5, "stuck", "stays between 0.499 and 0.501"),
        ([0.5, 0.7, 0.5], 0.5, "learning", "rises to 0.7 and comes back to 0.5"),
        ([0.5, 0.49, 0.48], 0.5, "learning", "falls from 0.5 to 0.48"),
        ([0.001, 0.01], 0.5, "diverging", "starts at 0.001 and ends ten times as high (the first rule wins)"),
    ]
    for losses, kl, wanted, what in cases:
        got = answer(list(losses), kl)
        if got is None:
            raise Wrong("The result is None: does every path return a word?")
        if got != wanted:
            raise Wrong(f"A loss that {what} is {wanted!r}, not {got!r}.")
