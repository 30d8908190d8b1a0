"""Checks of notebook 09: bytes of codes, bits of a layer, entropy of codes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .exercise import Wrong, exercise, expect_close


@exercise
def unpack_row(answer: Callable) -> None:
    got = answer([27, 228], 2, 8)
    if got == [3, 2, 1, 0, 0, 1, 2, 3]:
        raise Wrong("It reads each byte from its low end; the first digit sits in the highest bits.")
    if got is None or list(got) != [0, 1, 2, 3, 3, 2, 1, 0]:
        raise Wrong(f"The bytes 27 and 228 hold the digits 0 1 2 3 3 2 1 0; you found {got}.")
    got = list(answer([27, 228, 90], 6, 4))
    if got != [6, 62, 17, 26]:
        raise Wrong(f"At 6 bits the bytes 27, 228, 90 hold 6, 62, 17, 26; you found {got}. Indices cross bytes.")
    got = list(answer([27, 64], 4, 3))
    if got != [1, 11, 4]:
        raise Wrong(f"27, 64 hold three 4-bit indices, 1, 11, 4, then filling; you found {got}.")
    if list(answer([255, 255], 16, 1)) != [65535]:
        raise Wrong("An index may have up to 16 bits: 255, 255 is 65535.")


@exercise
def bits_a_weight(answer: Callable) -> None:
    got, wanted = answer(256, 256, 4), 8 * 17544 / 65536
    if isinstance(got, float) and abs(got - (wanted + 8 * 1096 / 65536)) < 1e-9:
        raise Wrong("Codebook and scales are fp16, 2 bytes per number; yours take 4.")
    expect_close(got, wanted, "bits per weight of [256, 256] with d = 4 (17,544 bytes)", 1e-9)
    got = answer(7, 10, 3)
    if not math.isclose(got, 8 * 100 / 70, rel_tol=1e-9):
        raise Wrong(
            f"[7, 10] with d = 3 takes 100 bytes, {800 / 70:.4f} bits per weight; you found {got:.4f}. "
            "Vectors, bytes of a row and bytes of signs are rounded up, each by itself."
        )


@exercise
def code_entropy(answer: Callable) -> None:
    got = answer(torch.tensor([[0, 1], [2, 3]]), 2)
    if isinstance(got, float) and abs(got - math.log(4)) < 1e-6:
        raise Wrong("That is in nats; bits want log2.")
    if isinstance(got, float) and abs(got - 1.0) < 1e-6:
        raise Wrong(
            "Four codewords used equally often carry 2 bits per vector; you found half of it. Bits a "
            "vector are wanted, whatever the number of weights in it."
        )
    expect_close(got, 2.0, "the entropy of four codewords used equally often", 1e-6)
    got = answer(torch.tensor([5, 5, 5, 9]), 8)
    if got is not None and math.isnan(got):
        raise Wrong("It is NaN where a codeword never occurs: 0 * log2(0) counts as 0, so drop zeros first.")
    expect_close(got, 0.8112781, "the entropy of the codes 5 5 5 9", 1e-6)
