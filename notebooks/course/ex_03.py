"""Checks of notebook 03: bits of a digit, decoding by two tables, symmetric search."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lcqat_min.codebook.affine import AffineCodebook, frame_planes

from .exercise import Wrong, exercise, expect_close


@exercise
def split_digit(answer: Callable) -> None:
    q = torch.tensor([[-1.5, -0.5], [0.5, 1.5]])
    got = answer(q.clone())
    if not isinstance(got, tuple) or len(got) != 2:
        raise Wrong("Return two tensors, hi and lo.")
    hi, lo = (torch.as_tensor(part, dtype=torch.float32) for part in got)
    if hi.shape != q.shape or lo.shape != q.shape:
        raise Wrong(f"hi and lo have shapes {list(hi.shape)} and {list(lo.shape)}; both need the shape of q, [2, 2].")
    for name, bits in {"hi": hi, "lo": lo}.items():
        if not (bits.abs() == 1).all():
            raise Wrong(f"Every bit is -1 or +1, but {name} of the four levels is {bits.flatten().tolist()}.")
    expect_close(hi + lo / 2, q, "hi + lo / 2")
    expect_close(hi, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), "hi")


@exercise
def decode_by_halves(answer: Callable) -> None:
    generator = torch.Generator().manual_seed(33)
    A, b = torch.randn(4, 8, generator=generator), torch.tensor([0.5, -1.0, 2.0, 0.0])
    book = AffineCodebook(A, b, 2)
    expect_close(answer(torch.tensor([0]), A, torch.zeros(4)), -A.sum(1)[None], "index 0 (all digits -1) with b = 0")
    for index, what in ((0x80, "1000 0000"), (0x01, "0000 0001")):
        got = answer(torch.tensor([index]), A, torch.zeros(4))
        what = f"the byte {what} with b = 0 (its first bit belongs to the first column of A)"
        expect_close(got, 2 * A[:, [0 if index == 0x80 else 7]].T - A.sum(1), what)
    every = torch.arange(256)
    got = answer(every, A, torch.zeros(4))
    expect_close(got, book.decode(every) - b, "the weights of all bytes with b = 0 (high half: left four columns of A)")
    got = answer(every, A, b)
    expect_close(got, book.decode(every), "the weights of all bytes with an offset b (is b added exactly once?)")


@exercise
def encode_symmetric(answer: Callable) -> None:
    generator = torch.Generator().manual_seed(34)
    skew = AffineCodebook(torch.randn(4, 8, generator=generator), torch.zeros(4), 2)  # codewords of many lengths
    for book, name in ((frame_planes(), "the frame"), (skew, "random planes")):
        words = book.codewords()
        x = torch.randn(300, 4, generator=generator)
        index = answer(x, words[128:])
        if not isinstance(index, torch.Tensor) or index.shape != (300,) or index.is_floating_point():
            raise Wrong("Return one whole number for each vector: an int64 tensor [N].")
        if index.min() < 0 or index.max() > 255:
            raise Wrong(f"Indices run from {index.min()} to {index.max()}; they must lie in 0 to 255.")
        if index.min() > 127:
            raise Wrong("All your indices lie in the upper half. Half of the vectors are nearer to a partner 255 - i.")
        error = (x - words[index]).square().sum(1)
        least = (x[:, None] - words).square().sum(2).amin(1)
        worse = int((error > least + 1e-4).sum())
        if worse:
            raise Wrong(
                f"With {name}, {worse} of 300 vectors got a codeword that is not the nearest. Do the scores"
                " subtract half of the squared length, and does the sign choose between i and 255 - i?"
            )
