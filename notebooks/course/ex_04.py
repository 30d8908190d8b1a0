"""Checks of notebook 04: an entry of H, turning both sides back, the fast transform."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lcqat_min.layer.rotation import hadamard, mix, random_signs, rotate

from .exercise import Wrong, exercise, expect_close


@exercise
def hadamard_entry(answer: Callable) -> None:
    expect_close(answer(0, 0, 4), 0.5, "entry (0, 0) of the matrix of size 4: 1 / sqrt(4)")
    expect_close(answer(1, 1, 2), -(0.5**0.5), "entry (1, 1) of the matrix of size 2")
    for size in (4, 16):
        H = hadamard(size)
        for i in range(size):
            for j in range(size):
                expect_close(answer(i, j, size), H[i, j], f"entry ({i}, {j}) of the matrix of size {size}")


@exercise
def turn_back(answer: Callable) -> None:
    generator = torch.Generator().manual_seed(42)
    out, width = 48, 96  # blocks of 16 and of 32
    W = torch.randn(out, width, generator=generator)
    ones_out, ones_in = torch.ones(out), torch.ones(width)
    s_out, s_in = random_signs(out, generator), random_signs(width, generator)
    cases = (
        (ones_out, ones_in, "W without any flipped sign"),
        (ones_out, s_in, "W with signs on the inputs only"),
        (s_out, s_in, "W with signs on both sides"),
    )
    for signs_out, signs_in, what in cases:
        W_r = rotate(rotate(W, signs_in).T, signs_out).T
        expect_close(answer(W_r.clone(), signs_out, signs_in), W, what)


@exercise
def fast_mix(answer: Callable) -> None:
    got = answer(torch.tensor([[1.0, -1.0, 1.0, 9.0]]))
    expect_close(got, torch.tensor([[5.0, -3.0, -5.0, 5.0]]), "the mixed row (1, -1, 1, 9)")
    generator = torch.Generator().manual_seed(43)
    for shape in ((3, 2), (2, 5, 64), (128,), (1,)):
        x = torch.randn(shape, generator=generator)
        kept = x.clone()
        expect_close(answer(x), mix(kept), f"the mixed x of shape {list(shape)}")
        if not torch.equal(x, kept):
            raise Wrong("Your function changes its input. Build new tensors instead of writing into x.")
