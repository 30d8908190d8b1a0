"""Check of the exercise in notebook 00."""

from __future__ import annotations

from collections.abc import Callable

from .exercise import Wrong, exercise, expect_close


@exercise
def megabytes(answer: Callable) -> None:
    """1000 weights of 16 bits are 2000 bytes, that is 0.002 MB."""
    got = answer(1_000_000, 16.0)
    if got == 16.0:
        raise Wrong("1,000,000 weights of 16 bits came out as 16: those are megabits. A byte is 8 bits.")
    if isinstance(got, float) and abs(got - 16e6 / 8 / 2**20) < 1e-6:
        raise Wrong("You divided by 1024 * 1024; here a megabyte is 1,000,000 bytes.")
    if got in (2_000_000, 2_000):
        raise Wrong(f"1,000,000 weights of 16 bits came out as {got:,.0f}; the answer in megabytes is 2.")
    expect_close(got, 2.0, "the size of 1,000,000 weights of 16 bits")
    expect_close(answer(8_000_000_000, 2.107), 2107.0, "the size of 8,000,000,000 weights of 2.107 bits")
    expect_close(answer(4, 2.0), 1e-6, "the size of 4 weights of 2 bits (one byte)", tolerance=1e-9)
