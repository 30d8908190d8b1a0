"""Products with packed weights in plain torch: for CPUs, and for any device without Triton.

    y = D x        D = decode(codes) [out, in] is never whole: a few rows at a time, in WORKSPACE bytes

A byte of codes holds four weights (2 bits each). From bytes to a product, exact in fp32:

decode   One lookup of 16 bytes, four fp32 weights, for each byte; then a dense product with the chunk. The
         lookup costs the same for every codebook that fills whole bytes, and is shared by all rows of x.

For one row of x, linearity instead of weights. With D = A q + b for each vector, and x_g the inputs of vector g,

             y = sum_g (A q_g + b)^T x_g = sum_g q_g^T (A^T x_g)  +  sum_g b^T x_g

so A is folded into x once, for all rows, and the digits are never made into weights:

planes   Digit j of every byte times its slice of A^T x: a mask, a conversion and a product for each of the 4 digits
         of four levels in a byte, or its 8 of two.
sums     What a byte can add to y is one of 256 sums of its digits times their folded inputs: make these sums once
         for each place of a byte, and a row of y is `in / 4` lookups of one number and a sum (T-MAC, arXiv
         2407.00088, for 2-bit grids). That is faster than eight planes, slower than four.

`compiled=True` hands few rows to torch.compile as planes, all in one pass over the bytes. It needs a C++ compiler
and compiles for seconds at the first call.

Gives up: threads share each small step of a chunk; no SIMD lookup as in hand-written kernels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .codebook import AffineCodebook, Codebook, TableCodebook
from .constants import made_once
from .digits import digits_of, index_of

WORKSPACE = 1 << 20  # bytes to decode into, used again and again: they stay in a core's second-level cache
DIGITS = 1 << 17  # of one plane, made at a time
LOOKUPS = 1 << 16  # sums looked up at a time
LONG_TABLE_PAYS = 1 << 17  # bytes of codes: from here on a table of all vectors of 16 bits is made and looked up
FEW_ROWS = 16  # of x; for more, a product costs much more than decoding and is faster in larger parts:
MANY_ROWS_FACTOR = 8  # times the workspace


def product(x: Tensor, codes: Tensor, book: Codebook, compiled: bool = False) -> Tensor:
    """D x: x fp32 [M, in], codes uint8 [out, bytes] -> fp32 [M, out], without gradient.

    compiled: run products of few rows through torch.compile (affine codebooks only).
    """
    affine = isinstance(book, AffineCodebook)
    with torch.no_grad():
        if affine and torch.compiler.is_compiling() and len(x) <= FEW_ROWS:
            return _sum_of_planes(*fold(x, codes.shape[1], book), codes)  # chunks would be nodes by the thousand
        if affine and compiled and len(x) <= FEW_ROWS:
            if (y := attempt(_by_compiled_planes, x, codes, book)) is not None:
                return y
        if affine and len(x) == 1:
            return _by_planes(x, codes, book) if book.levels == 4 else _by_sums(x, codes, book)
        return _by_decoding(x, codes, book)


def decode(codes: Tensor, book: Codebook, columns: int) -> Tensor:
    """Codes uint8 [rows, bytes] -> weights fp32 [rows, columns], without scales."""
    if (table := _fours(book, codes.numel())) is not None:
        return F.embedding(_fours_of(codes, book), table).flatten(1)[:, :columns]
    vectors = -(-columns // book.dim)
    levels = 2 if isinstance(book, TableCodebook) else book.levels
    digits = F.embedding(codes.int(), _byte_digits(levels, codes.device)).flatten(1)
    count = book.bits // (levels.bit_length() - 1)
    digits = digits[:, : vectors * count].unflatten(1, (vectors, count))
    weights = book.decode(index_of(digits, 2)) if isinstance(book, TableCodebook) else digits @ book.A.T + book.b
    return weights.flatten(1)[:, :columns]


def fold(x: Tensor, row_bytes: int, book: AffineCodebook) -> tuple[Tensor, Tensor]:
    """A folded into x: x fp32 [M, in] -> fp32 [planes, M, bytes] for masked digits, and a constant [M].

    A digit j of `levels` at shift s in its byte is c_j = (byte & mask_j) / 2^s = 0 ... levels - 1, and
    q_j = alpha c_j - beta, so  sum_j q_j x'_j = sum_j (alpha 2^-s x'_j) (byte & mask_j) - beta sum_j x'_j.
    """
    planes, beta = (4, 1.5) if book.levels == 4 else (8, 1.0)
    vectors = _padded(x, -(-x.shape[1] // book.dim) * book.dim).unflatten(1, (-1, book.dim))
    constant = vectors.sum(1) @ (book.b - beta * book.A.sum(1))
    digits = _padded((vectors @ book.A).flatten(1), row_bytes * planes).view(len(x), row_bytes, planes)
    return (digits * _plane_scales(planes, x.device)).permute(2, 0, 1).contiguous(), constant


def byte_table(book: Codebook) -> Tensor:
    """The four weights of every byte, fp32 [256, 4], for codebooks that fill whole bytes at 2 bits a weight."""
    shifts = torch.arange(8 - book.bits, -1, -book.bits, device=device_of(book))
    index = torch.arange(256, device=device_of(book))[:, None] >> shifts & (1 << book.bits) - 1
    return book.decode(index).reshape(256, 4)


def _fours(book: Codebook, count: int) -> Tensor | None:
    """All that the four weights of a byte can be, fp32 [256, 4]; for vectors of two bytes both halves, [131 072, 4].

    None if there is no such table, or if it costs more than it saves on `count` bytes of codes.
    """
    if book.bits == 16:
        return _all_codewords(book).reshape(-1, 4) if count >= LONG_TABLE_PAYS else None
    return byte_table(book) if 8 % book.bits == 0 else None


def _fours_of(codes: Tensor, book: Codebook) -> Tensor:
    """Codes uint8 [rows, bytes] -> for each byte, the row of _fours(book) with its weights, int32 [rows, bytes]."""
    if book.bits < 16:
        return codes.int()
    first_half = codes[:, ::2].int() * 512 + codes[:, 1::2].int() * 2
    return torch.stack([first_half, first_half + 1], 2).flatten(1)


def _all_codewords(book: Codebook) -> Tensor:
    """book.codewords() of 16 bits; for two-level digits as sums of two halves, in a tenth of the time."""
    if isinstance(book, TableCodebook) or book.levels == 4:
        return book.codewords()
    digits = _byte_digits(2, device_of(book))
    first, second = digits @ book.A[:, :8].T, digits @ book.A[:, 8:].T + book.b
    return (first[:, None] + second).flatten(0, 1)


_failed: set[str] = set()  # names of what failed once and is not tried again


def attempt(call: Callable[..., Tensor], *arguments) -> Tensor | None:
    """call(*arguments); or None, with one warning, if it fails now or has failed before.

    For what is faster but may be missing: a compiler, a driver, a package. Running out of memory is not caught.
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
        warnings.warn(f"{call.__name__} failed; plain torch takes its place. Nothing to do but wait longer{remedy}. "
                      f"Cause: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)
        return None


def _by_planes(x: Tensor, codes: Tensor, book: AffineCodebook) -> Tensor:
    folded, constant = fold(x, codes.shape[1], book)
    y = x.new_zeros(len(codes))
    rows = max(1, DIGITS // codes.shape[1])
    masked = codes.new_empty(rows, codes.shape[1])  # used again and again: fresh memory costs as much as the work
    digits = x.new_empty(masked.shape)
    for part, into in zip(codes.split(rows), y.split(rows), strict=True):
        for mask, plane in zip(_masks(len(folded)), folded, strict=True):
            torch.bitwise_and(part, mask, out=masked[: len(part)])
            into.addmv_(digits[: len(part)].copy_(masked[: len(part)]), plane[0])
    return (y + constant)[None]


def _by_sums(x: Tensor, codes: Tensor, book: AffineCodebook) -> Tensor:
    folded, constant = fold(x, codes.shape[1], book)
    sums = (folded[:, 0].T @ _masked_bytes(len(folded), x.device)).flatten()  # [bytes * 256]: 256 for each place
    first = 256 * torch.arange(codes.shape[1], dtype=torch.int32, device=x.device)
    y = x.new_empty(len(codes))
    rows = max(1, LOOKUPS // codes.shape[1])
    place = first.new_empty(rows, codes.shape[1])
    found = x.new_empty(place.numel())
    for part, into in zip(codes.split(rows), y.split(rows), strict=True):
        where = place[: len(part)].copy_(part).add_(first).flatten()
        torch.index_select(sums, 0, where, out=found[: len(where)])
        torch.sum(found[: len(where)].view(part.shape), 1, out=into)
    return (y + constant)[None]


def _by_decoding(x: Tensor, codes: Tensor, book: Codebook) -> Tensor:
    y = x.new_empty(len(codes), len(x))
    workspace = WORKSPACE if len(x) <= FEW_ROWS else WORKSPACE * MANY_ROWS_FACTOR
    rows = max(1, workspace // (16 * codes.shape[1]))
    for weights, into in zip(_decoded(codes, rows, book, x.shape[1]), y.split(rows), strict=True):
        torch.mm(weights, x.T, out=into)
    return y.T


def _decoded(codes: Tensor, rows: int, book: Codebook, columns: int) -> Iterator[Tensor]:
    """decode() of some rows at a time; on a CPU all into the same memory: fresh memory costs as much as the lookup."""
    table = _fours(book, codes.numel()) if codes.device.type == "cpu" else None
    if table is None:
        yield from (decode(part, book, columns) for part in codes.split(rows))
        return
    # As one 16-byte number each, four weights are copied at once: 3 times faster than a row of four floats.
    table = table.contiguous().view(torch.complex128).squeeze(1)
    four = torch.empty(rows * codes.shape[1], dtype=torch.complex128)
    for part in codes.split(rows):
        found = torch.index_select(table, 0, _fours_of(part, book).flatten(), out=four[: part.numel()])
        yield found.view(torch.float32).view(len(part), -1)[:, :columns]


def _by_compiled_planes(x: Tensor, codes: Tensor, book: AffineCodebook) -> Tensor:
    folded, constant = fold(x, codes.shape[1], book)  # few and small steps: called faster than compiled
    if len(x) == 1:
        folded = folded[:, 0]  # compiled by itself, a single row takes two thirds of the time
    return _compiled(_sum_of_planes)(folded, constant, codes).view(len(x), -1)


def _sum_of_planes(folded: Tensor, constant: Tensor, codes: Tensor) -> Tensor:
    wide = codes.int()  # widened once, not for each plane; and a sum for each plane, so that none waits for another
    terms = (((wide & mask).float() * plane.unsqueeze(-2)).sum(-1)
             for mask, plane in zip(_masks(len(folded)), folded, strict=True))
    return sum(terms) + constant[:, None]


@lru_cache(maxsize=2)
def _compiled(function: Callable) -> Callable:
    # The option: multiply and add in one instruction, which rounds once instead of twice, takes a fifth less time.
    return torch.compile(function, options={"cpp.enable_floating_point_contract_flag": "fast"})


def _masks(planes: int) -> list[int]:
    width = 8 // planes
    return [((1 << width) - 1) << 8 - width * (j + 1) for j in range(planes)]


@made_once
def _plane_scales(planes: int, device: torch.device) -> Tensor:
    """alpha 2^-s of every plane, fp32 [planes]: from a masked byte to its digit, but for the offset."""
    alpha = 1.0 if planes == 4 else 2.0
    return torch.tensor([alpha * 0.5 ** (8 // planes * j) for j in reversed(range(planes))], device=device)


def _padded(x: Tensor, columns: int) -> Tensor:
    """x [M, n] with zeros up to `columns`; x itself if there is nothing to add (F.pad would copy it)."""
    return F.pad(x, (0, columns - x.shape[1])) if columns > x.shape[1] else x


@made_once
def _masked_bytes(planes: int, device: torch.device) -> Tensor:
    """byte & mask of every plane and byte, fp32 [planes, 256]."""
    masks = torch.tensor(_masks(planes), device=device)[:, None]
    return (torch.arange(256, device=device) & masks).float()


@made_once
def _byte_digits(levels: int, device: torch.device) -> Tensor:
    """Digits of every byte, fp32 [256, 4 or 8]."""
    return digits_of(torch.arange(256, device=device), 4 if levels == 4 else 8, levels)


def device_of(book: Codebook) -> torch.device:
    """Where the numbers of a codebook are."""
    return (book.table if isinstance(book, TableCodebook) else book.A).device
