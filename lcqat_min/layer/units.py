"""Numbers in units of their own size, so that fp32 holds their squares."""

from __future__ import annotations

import math

from torch import Tensor


def in_units(x: Tensor) -> tuple[Tensor, float]:
    """x in units of a power of four near its largest number, and that unit. No digit of x changes."""
    largest = x.abs().max().item()
    unit = 4.0 ** max((math.frexp(largest)[1] - 1) // 2, -63) if largest else 1.0  # a smaller one would be subnormal
    return x / unit, unit


def root_mean_square(x: Tensor) -> float:
    """sqrt(mean(x^2))."""
    x, unit = in_units(x.detach())
    return x.square().mean().sqrt().item() * unit
