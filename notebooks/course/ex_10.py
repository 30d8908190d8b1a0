"""Checks of notebook 10: predicted speed, folding A into x, tables of half bytes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lcqat_min.codebook.affine import AffineCodebook
from lcqat_min.codebook.digits import digits_of

from .exercise import Wrong, exercise, expect_close


@exercise
def predicted_gain(answer: Callable) -> None:
    expect_close(answer(1024, 1024, 1e12, 0.0), 8.0, "the gain without overhead (a quarter byte against two)", 1e-9)
    got = answer(1000, 1000, 1e12, 1e-6)  # 2 + 1 microseconds over 0.25 + 1
    if isinstance(got, float) and math.isclose(got, 8.0):
        raise Wrong("Every launch costs `overhead` seconds, in bf16 and in 2 bits; you leave it out.")
    if isinstance(got, float) and (math.isclose(got, 2.0 / 1.25) or math.isclose(got, 3.0 / 0.25)):
        raise Wrong("The overhead is part of both times; you add it to one.")
    expect_close(got, 2.4, "the gain of 1000 x 1000 at 1 TB/s with 1 microsecond of overhead (3 over 1.25)", 1e-9)


@exercise
def folded_product(answer: Callable) -> None:
    A, b = torch.tensor([[2.0, 1, 0, 1], [0, 1, 2, -1]]), torch.tensor([1.0, -1])
    q = torch.tensor([[[1.0, 1, -1, 1], [-1, 1, 1, -1]], [[-1, -1, 1, 1], [1, -1, 1, 1]]])
    x = torch.tensor([[3.0, 1, -1, 2]])
    wanted = _product(q, A, b, x)
    got = answer(q, A, b, x)
    if isinstance(got, torch.Tensor) and got.shape == wanted.shape:
        part = wanted - _product(q, A, 0 * b, x)
        if torch.allclose(got, wanted - part):
            raise Wrong("The part of b is missing: b^T x_g, summed over groups, the same for every row.")
        if torch.allclose(got, wanted + part):
            raise Wrong("b is counted more than once: it meets each x_g once.")
    expect_close(got, wanted, "y of the numbers of section 3 ([1 token, 2 rows])")
    generator = torch.Generator().manual_seed(0)
    A, b = torch.randn(4, 4, generator=generator), torch.randn(4, generator=generator)
    q = torch.randint(0, 4, (6, 5, 4), generator=generator) - 1.5
    x = torch.randn(3, 20, generator=generator)
    got = answer(q, A, b, x)
    if isinstance(got, torch.Tensor) and got.shape == (3, 6) and torch.allclose(got, _product(q, A.T, b, x), atol=1e-4):
        raise Wrong("For a square A yours multiplies with A where A^T x_g is wanted.")
    expect_close(got, _product(q, A, b, x), "y for 3 tokens, 6 rows and digits of four levels", 1e-3)


def _product(q: torch.Tensor, A: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ (q @ A.T + b).flatten(1).T


@exercise
def nibble_tables(answer: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    for d, k in ((4, 8), (8, 16)):
        A, b = torch.randn(d, k, generator=generator), torch.randn(d, generator=generator)
        tables = answer(A, b)
        if tables is None or tuple(tables.shape) != (k // 4, 16, d):
            shape = None if tables is None else list(tables.shape)
            raise Wrong(f"For A [{d}, {k}] the tables are [{k // 4}, 16, {d}]; yours are {shape}.")
        index = torch.randint(0, 1 << k, (200,), generator=generator)
        nibbles = [index >> 4 * (k // 4 - 1 - n) & 15 for n in range(k // 4)]
        got = sum(table[nibble] for table, nibble in zip(tables, nibbles, strict=True))
        wanted = AffineCodebook(A, b, 2).decode(index)
        if torch.allclose(got, wanted + (k // 4 - 1) * b, atol=1e-4):
            raise Wrong(f"One entry of each table is added up, so your b counts {k // 4} times; once is right.")
        if torch.allclose(got, wanted - b, atol=1e-4):
            raise Wrong("b is missing: put it into one of the tables.")
        if torch.allclose(sum(t[n] for t, n in zip(tables.flip(0), nibbles, strict=True)), wanted, atol=1e-4):
            raise Wrong("The first table belongs to the highest half byte, the first columns of A; yours are reversed.")
        if torch.allclose(got, digits_of(index, k, 2).flip(1) @ A.T + b, atol=1e-4):
            raise Wrong("Digits are big-endian: the first column of A goes with the highest bit.")
        expect_close(got, wanted, f"the sum of one entry of each table, for A [{d}, {k}]", 1e-3)
