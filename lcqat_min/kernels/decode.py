"""Products with packed weights in plain torch: for CPUs, and for any device without Triton.

    y = D x        D = decode(codes) [out, in] is never whole: a few rows at a time, in WORKSPACE bytes

A byte of codes holds four weights (2 bits each). From bytes to a product, exact in fp32:

decode   One lookup of 16 bytes, four fp32 weights, for each byte; then a dense product with the chunk. The
         lookup costs the same for every codebook that fills whole bytes, and is shared by all rows of x. A vector
         of two bytes is a sum of two lookups, since A q is a sum over digits.
fold     Few rows of x with an affine codebook take a shorter way, on which no weight is ever made (kernels/fold.py).

`compiled=True` hands few rows to torch.compile. It needs a C++ compiler and compiles for seconds at the first call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cached_tensors import made_once
from ..codebook.affine import AffineCodebook
from ..codebook.digits import digits_of, index_of
from ..codebook.matrix import Codebook
from ..codebook.table import TableCodebook
from .fold import MOST_BYTES, by_compiled_planes, by_integers, by_planes, by_sums, multiplies_bytes

WORKSPACE = 1 << 20  # bytes to decode into, used again and again: they stay in a core's second-level cache
SUMS_PAY = 1 << 10  # bytes in a row of codes: the sums of longer ones leave the cache, and decoding is faster
INTEGERS_PAY = 1 << 18  # bytes of codes: below, folded.by_integers' many steps cost more than the lookups of others
FEW_ROWS = 16  # of x; for more, a product costs much more than decoding and is faster in larger parts:
MANY_ROWS_FACTOR = 8  # times the workspace


def product(x: Tensor, codes: Tensor, book: Codebook, compiled: bool = False) -> Tensor:
    """D x: x fp32 [M, in], codes uint8 [out, bytes] -> fp32 [M, out], without gradient.

    compiled: run products of few rows through torch.compile (affine codebooks only).
    """
    with torch.no_grad():
        if isinstance(book, AffineCodebook) and 0 < len(x) <= FEW_ROWS:
            if torch.compiler.is_compiling():
                return by_planes(x, codes, book)  # chunks would be nodes by the thousand
            if compiled and (y := attempt(by_compiled_planes, x, codes, book)) is not None:
                return y
            if _suits_integers(codes) and (y := attempt(by_integers, x, codes, book)) is not None:
                return y
            if len(x) == 1 and (codes.shape[1] <= SUMS_PAY or book.bits == 16):
                return by_sums(x, codes, book)
        return _by_decoding(x, codes, book)


def decode(codes: Tensor, book: Codebook, columns: int) -> Tensor:
    """Codes uint8 [rows, bytes] -> weights fp32 [rows, columns], without scales."""
    if 8 % book.bits == 0:
        return F.embedding(codes.int(), byte_table(book)).flatten(1)[:, :columns]
    if book.bits == 16 and isinstance(book, AffineCodebook):
        second = 256 * (torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device) % 2)
        pairs = (codes.int() + second).reshape(-1, 2)
        return F.embedding_bag(pairs, _two_byte_tables(book), mode="sum").view(len(codes), -1)[:, :columns]
    vectors = -(-columns // book.dim)
    levels = 2 if isinstance(book, TableCodebook) else book.levels
    digits = F.embedding(codes.int(), _byte_digits(levels, codes.device)).flatten(1)
    count = book.bits // (levels.bit_length() - 1)
    digits = digits[:, : vectors * count].unflatten(1, (vectors, count))
    weights = book.decode(index_of(digits, 2)) if isinstance(book, TableCodebook) else digits @ book.A.T + book.b
    return weights.flatten(1)[:, :columns]


def byte_table(book: Codebook) -> Tensor:
    """The four weights of every byte, fp32 [256, 4], for codebooks that fill whole bytes at 2 bits a weight."""
    shifts = torch.arange(8 - book.bits, -1, -book.bits, device=device_of(book))
    index = torch.arange(256, device=device_of(book))[:, None] >> shifts & (1 << book.bits) - 1
    return book.decode(index).reshape(256, 4)


def _two_byte_tables(book: AffineCodebook) -> Tensor:
    """For vectors of two bytes: what each byte adds to the vector, fp32 [512, d], the first byte's 256 first."""
    digits = _byte_digits(book.levels, device_of(book))
    tables = digits @ book.A.unflatten(1, (2, -1)).permute(1, 2, 0)  # [2, 256, d]
    tables[0] += book.b
    return tables.flatten(0, 1)


_failed: set[str] = set()  # names of what failed once and is not tried again


def attempt(call: Callable[..., Tensor], *arguments) -> Tensor | None:
    """call(*arguments); or None, with one warning, if it fails now or has failed before.

    For what is faster but may be missing: a compiler, a driver, a package. Running out of GPU memory is not caught.
    """
    if call.__name__ in _failed:
        return None
    try:
        return call(*arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _failed.add(call.__name__)
        remedy = ", or `pip install triton`" if isinstance(error, ImportError) else ""
        warnings.warn(
            f"{call.__name__} failed; plain torch takes its place. Nothing to do but wait longer{remedy}. "
            f"Cause: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _suits_integers(codes: Tensor) -> bool:
    numbers = codes.device.type == "cpu" and type(codes) is Tensor  # not the fake tensors that programs are traced with
    fits = codes.numel() >= INTEGERS_PAY and codes.shape[1] <= MOST_BYTES
    return numbers and fits and torch.backends.mkldnn.enabled and multiplies_bytes()


def _by_decoding(x: Tensor, codes: Tensor, book: Codebook) -> Tensor:
    y = x.new_empty(len(codes), len(x))
    workspace = WORKSPACE if len(x) <= FEW_ROWS else WORKSPACE * MANY_ROWS_FACTOR
    rows = max(1, workspace // (16 * codes.shape[1]))
    for weights, into in zip(_decoded(codes, rows, book, x.shape[1]), y.split(rows), strict=True):
        torch.mm(weights, x.T, out=into)
    return y.T


def _decoded(codes: Tensor, rows: int, book: Codebook, columns: int) -> Iterator[Tensor]:
    """decode() of some rows at a time; bytes all into the same memory, as fresh memory costs as much as the lookup."""
    if codes.device.type != "cpu" or 8 % book.bits:
        yield from (decode(part, book, columns) for part in codes.split(rows))
        return
    # As one 16-byte number each, four weights are copied at once: 3 times faster than a row of four floats.
    table = byte_table(book).contiguous().view(torch.complex128).squeeze(1)
    four = torch.empty(rows * codes.shape[1], dtype=torch.complex128)
    for part in codes.split(rows):
        found = torch.index_select(table, 0, part.int().flatten(), out=four[: part.numel()])
        yield found.view(torch.float32).view(len(part), -1)[:, :columns]


@made_once
def _byte_digits(levels: int, device: torch.device) -> Tensor:
    """Digits of every byte, fp32 [256, 4 or 8]."""
    return digits_of(torch.arange(256, device=device), 4 if levels == 4 else 8, levels)


def device_of(book: Codebook) -> torch.device:
    """Where the numbers of a codebook are."""
    return (book.table if isinstance(book, TableCodebook) else book.A).device
