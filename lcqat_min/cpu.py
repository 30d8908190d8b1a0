"""Products with packed weights in plain torch: for CPUs, and for any device without Triton.

    y = D x        D = decode(codes) [out, in] is never whole: a few rows at a time, in WORKSPACE bytes

At 2 bits a weight a byte of codes holds four weights. Two ways from bytes to a product:

table      One lookup of 16 bytes, four fp32 weights, for each byte; then a dense product with these rows. It
           serves every codebook and any number of rows of x.
integers   Linearity instead of lookups, for few rows of x. With D = A q + b and x_g the inputs of vector g,

               y = sum_g (A q_g + b)^T x_g = sum_g q_g^T (A^T x_g)  +  sum_g b^T x_g

           so A is folded into x, once for all rows. What is left multiplies digits, which are small integers
           already: one AND with a mask takes digit j out of every byte, and where it stays in the byte, 2^s
           times too large, x pays with a factor 2^-s. x becomes integer as well, 32 bits in four *limbs*
           of 8. Products of bytes with bytes are exact, and processors have an instruction for them (VNNI).
           The kernels for GPUs do the same (kernels.py).

`compiled=True` instead leaves the sum over digits to torch.compile, which writes no digit to memory. It needs a
C++ compiler, and some seconds at the first call for each shape.

Gives up: calls of small layers cost what their thirty or so small torch operations cost.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .codebook import AffineCodebook, Codebook, TableCodebook, digits_of, index_of

WORKSPACE = 1 << 20  # bytes to decode into, used again and again: they stay in a core's second-level cache
FEW_ROWS = 16  # of x; for more, a product costs much more than decoding and is faster in larger parts:
MANY_ROWS_FACTOR = 8  # times the workspace
MOST_BYTES = 1 << 14  # in a row of codes, so that sums of 8 digits a byte times limbs stay below 2^31
BYTES_OF_128 = 0x80808080 - (1 << 32)


def product(x: Tensor, codes: Tensor, book: Codebook, compiled: bool = False) -> Tensor:
    """D x: x fp32 [M, in], codes uint8 [out, bytes] -> fp32 [M, out], without gradient.

    compiled: run products of few rows through torch.compile (affine codebooks only).
    """
    with torch.no_grad():
        if 0 < len(x) <= FEW_ROWS and isinstance(book, AffineCodebook):
            if compiled and (y := attempt(_by_compiled_sums, x, codes, book)) is not None:
                return y
            if codes.device.type == "cpu" and _multiplies_bytes() and codes.shape[1] < MOST_BYTES:
                return _by_integers(x, codes, book)
        return _by_table(x, codes, book)


def decode(codes: Tensor, book: Codebook, columns: int) -> Tensor:
    """Codes uint8 [rows, bytes] -> weights fp32 [rows, columns], without scales."""
    vectors = -(-columns // book.dim)
    if _whole_bytes(book):
        return F.embedding(codes.int(), byte_table(book)).flatten(1)[:, :columns]
    levels = 2 if isinstance(book, TableCodebook) else book.levels
    digits = F.embedding(codes.int(), _byte_digits(levels, codes.device)).flatten(1)
    count = book.bits // (levels.bit_length() - 1)
    digits = digits[:, : vectors * count].unflatten(1, (vectors, count))
    weights = book.decode(index_of(digits, 2)) if isinstance(book, TableCodebook) else digits @ book.A.T + book.b
    return weights.flatten(1)[:, :columns]


def byte_table(book: Codebook) -> Tensor:
    """The four weights of every byte, fp32 [256, 4], for codebooks that fill whole bytes at 2 bits a weight."""
    device = (book.table if isinstance(book, TableCodebook) else book.A).device
    shifts = torch.arange(8 - book.bits, -1, -book.bits, device=device)
    index = torch.arange(256, device=device)[:, None] >> shifts & (1 << book.bits) - 1
    return book.decode(index).reshape(256, 4)


def fold(x: Tensor, row_bytes: int, book: AffineCodebook) -> tuple[Tensor, Tensor]:
    """A folded into x: fp32 [M, in] -> z fp32 [M, digits a byte, bytes] and a constant [M], so that

        y = sum of z_j v_j + constant        v_j = int8((byte ^ 128) & mask_j)

    Digit j of a byte, at shift s, is c_j = 0 ... levels - 1 and means q_j = alpha c_j - beta. The flipped sign bit
    makes the byte two's complement: v_j = 2^s c_j for all but the first, v_0 = 2^s c_0 - 128.
    """
    if x.shape[1] % book.dim:
        x = F.pad(x, (0, -x.shape[1] % book.dim))
    vectors = x.view(len(x), -1, book.dim)
    digits = (vectors @ book.A).flatten(1)
    factor, offset = _digit_scales(book.levels, x.device)
    missing = row_bytes * len(factor) - digits.shape[1]
    digits = (F.pad(digits, (0, missing)) if missing else digits).view(len(x), row_bytes, len(factor))
    return (digits * factor).transpose(1, 2), digits.sum(1) @ offset + vectors.sum(1) @ book.b


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


def _by_integers(x: Tensor, codes: Tensor, book: AffineCodebook) -> Tensor:
    z, constant = fold(x, codes.shape[1], book)
    masks = torch.tensor(_masks(z.shape[1]), dtype=torch.int8)[:, None]
    z = z.reshape(len(x), -1)
    unit = z.abs().amax(1, keepdim=True).clamp_(min=1e-30).div_(2**30)
    # 128 added to each byte of an integer, then taken off each byte alone: what is left are digits of base 256.
    limbs = ((z / unit).round_().int() + BYTES_OF_128 ^ BYTES_OF_128).view(torch.int8)
    right = limbs.view(len(x), -1, 4).transpose(0, 1).reshape(-1, 4 * len(x))
    weights = unit.double() * 256.0 ** torch.arange(4, dtype=torch.float64)
    y = x.new_empty(len(codes), len(x))
    rows = max(1, WORKSPACE // len(right))
    digits = torch.empty((min(rows, len(codes)), len(masks), codes.shape[1]), dtype=torch.int8)
    for part, into in zip(codes.view(torch.int8).split(rows), y.split(rows), strict=True):
        left = torch.bitwise_and((part ^ -128)[:, None], masks, out=digits[: len(part)]).flatten(1)
        into.copy_((torch._int_mm(left, right).view(-1, len(x), 4) * weights).sum(2))
    return (y + constant).T


def _by_table(x: Tensor, codes: Tensor, book: Codebook) -> Tensor:
    y = x.new_empty(len(codes), len(x))
    workspace = WORKSPACE if len(x) <= FEW_ROWS else WORKSPACE * MANY_ROWS_FACTOR
    parts = codes.split(max(1, workspace // (16 * codes.shape[1])))
    for weights, into in zip(_decoded(parts, book, x.shape[1]), y.split(len(parts[0])), strict=True):
        torch.mm(weights, x.T, out=into)
    return y.T


def _decoded(parts: Sequence[Tensor], book: Codebook, columns: int) -> Iterator[Tensor]:
    """decode() of each part; on a CPU all into the same memory, since fresh memory costs as much as the lookup."""
    if parts[0].device.type != "cpu" or not _whole_bytes(book):
        yield from (decode(part, book, columns) for part in parts)
        return
    # As one 16-byte number each, four weights are copied at once: 3 times faster than a row of four floats.
    table = byte_table(book).contiguous().view(torch.complex128).squeeze(1)
    index = torch.empty(parts[0].numel(), dtype=torch.int32)
    four = torch.empty(parts[0].numel(), dtype=torch.complex128)
    for part in parts:
        found = torch.index_select(table, 0, index[: part.numel()].copy_(part.flatten()), out=four[: part.numel()])
        yield found.view(torch.float32).view(len(part), -1)[:, :columns]


def _by_compiled_sums(x: Tensor, codes: Tensor, book: AffineCodebook) -> Tensor:
    z, constant = fold(x, codes.shape[1], book)
    return _compiled()(z.contiguous(), codes.view(torch.int8)) + constant[:, None]


@lru_cache(maxsize=1)
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    def sum_of_digits(z: Tensor, codes: Tensor) -> Tensor:
        masks = _masks(z.shape[1])
        return sum(((codes ^ -128) & mask).float() * z[:, None, j] for j, mask in enumerate(masks)).sum(2)

    return torch.compile(sum_of_digits)


def _masks(digits: int) -> list[int]:
    """Where the digits of a byte are, highest first, as int8."""
    width = 8 // digits
    return [-(1 << 8 - width)] + [(256 - (1 << 8 - width)) >> width * j for j in range(1, digits)]


@lru_cache(maxsize=8)
def _digit_scales(levels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each digit of a byte: alpha 2^-s, and what is left of q_j once alpha 2^-s v_j is taken off; fp32 both."""
    digits, alpha, beta = (4, 1.0, 1.5) if levels == 4 else (8, 2.0, 1.0)
    factor = alpha * 0.5 ** (8 // digits * torch.arange(digits - 1, -1, -1, dtype=torch.float32))
    first = torch.zeros(digits)
    first[0] = 128 * factor[0]
    return factor.to(device), (first - beta).to(device)


@lru_cache(maxsize=1)
def _multiplies_bytes() -> bool:
    """Whether this CPU has exact and fast products of bytes. Without VNNI they are slow, and may saturate."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.backends.mkldnn.is_available() and bool(found.get("avx512_vnni") or found.get("avx_vnni"))


def _whole_bytes(book: Codebook) -> bool:
    return 8 % book.bits == 0


@lru_cache(maxsize=8)
def _byte_digits(levels: int, device: torch.device) -> Tensor:
    """Digits of every byte, fp32 [256, 4 or 8]."""
    return digits_of(torch.arange(256, device=device), 4 if levels == 4 else 8, levels)
