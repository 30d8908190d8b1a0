"""Units: the size of a tensor, measured without overflow.

    rms(x) = sqrt( mean( x^2 ) )

The squares of large and small fp32 numbers are infinite or 0 (1e20, 1e-25). So x is divided by a power of four near its
largest number first. This changes no digit, and the square root of a power of four is a power of two.

Limits: the squares of numbers below 1e-22 times the largest one count as 0.
"""

from __future__ import annotations

import math

from torch import Tensor


def in_units(x: Tensor) -> tuple[Tensor, float]:
    """x in units of a power of four near its largest number, and that unit (1 for zeros): x = first * unit."""
    largest = x.abs().max().item()
    unit = 4.0 ** max((math.frexp(largest)[1] - 1) // 2, -63) if largest else 1.0  # no smaller: it would be subnormal
    return x / unit, unit


def root_mean_square(x: Tensor) -> float:
    """Root mean square of all numbers of x, without gradient; 0 for zeros."""
    x, unit = in_units(x.detach())
    return x.square().mean().sqrt().item() * unit
