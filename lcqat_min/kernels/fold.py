"""Products with packed weights that never make a weight: A is folded into x. For few rows of x, in plain torch.

With D = A q + b for each vector of d weights, q its k digits, and x_g the inputs of vector g, a row of D x is

             y = sum_g (A q_g + b)^T x_g = sum_g q_g^T (A^T x_g)  +  sum_g b^T x_g

so A goes into x once, for all rows of D (`fold`), and what is left multiplies digits. No free table can do that.
Digits lie in bytes, four of four levels or eight of two. To take one out, one AND is enough: it stays where it is in
its byte, as v = 2^s c for a digit c = 0 ... L - 1 at shift s. Since q = alpha c - beta,

             q x' = f (v + o)        f = alpha 2^-s x',    o = -(beta / alpha) 2^s

with f made once for all rows of D, and o the same for all bytes. Three ways on from there:

integers   v is an operand already, if f becomes integer as well: 31 bits on a scale of its own, in four *limbs* of 8
           bits. Processors have an instruction that multiplies bytes and adds up (VNNI). No sum can overflow 32 bits
           (MOST_BYTES), so all are exact: only folding, the step to integers and the result are rounded, to about
           seven digits of the largest input. The kernels for GPUs do the same (kernels/triton_kernels.py).
sums       On other processors, for one row of x: what a byte can add to y is one of 256 sums of f (v + o). Make these
           sums once for each place of a byte, and a row of y is `in / 4` lookups of one number and a sum (T-MAC,
           arXiv 2407.00088, for 2-bit grids).
planes     v converted to fp32, times the plane of f of its digit. For a compiler that makes one pass over the bytes
           of all these operations, and of no use without one. Offsets are added at the end, which costs one or two
           digits where inputs have a mean far from zero. Rotated ones do not.

Gives up: each small step of a chunk ends before the next begins; no SIMD lookup as in hand-written kernels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cached_tensors import made_once
from ..codebook.affine import AffineCodebook

DIGITS = 1 << 19  # bytes of digits taken out at a time, in the same memory: they stay in a second-level cache
LEAST_ROWS = 64  # of them, however long: each product prepares the limbs again
LOOKUPS = 1 << 16  # sums looked up at a time
MOST_BYTES = 1 << 16  # in a row of codes: 65 536 bytes times 255 * 128 are less than 2^31
BYTES_OF_128 = 0x80808080 - (1 << 32)  # as int32


def fold(x: Tensor, row_bytes: int, book: AffineCodebook, signed: bool = False) -> tuple[Tensor, Tensor]:
    """A folded into x: fp32 [M, in] -> f fp32 [M, bytes, parts], one for each part of a byte, and sum_g b^T x_g, [M].

    Parts are digits; or, where bytes are read as signed, those of `_masks`.
    """
    planes = 4 if book.levels == 4 else 8
    vectors = _padded(x, -(-x.shape[1] // book.dim) * book.dim).unflatten(1, (-1, book.dim))
    digits = _padded((vectors @ book.A).flatten(1), row_bytes * planes).view(len(x), row_bytes, planes)
    return digits @ _factors(planes, signed, x.device), vectors.sum(1) @ book.b


@lru_cache(maxsize=1)
def multiplies_bytes() -> bool:
    """Whether products of bytes are fast and exact on this CPU, as they are with AVX-512 VNNI.

    Others go through sums of 16 bits, which overflow (AVX2), or through one product at a time.
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if not (has_avx512 and torch.backends.mkldnn.is_available()):
        return False
    largest = torch.full((64, 64), 127, dtype=torch.int8, device="cpu")
    return bool((torch._int_mm(largest, largest) == 64 * 127 * 127).all())


def by_integers(x: Tensor, codes: Tensor, book: AffineCodebook) -> Tensor:
    """D x for a CPU that `multiplies_bytes` and rows of at most MOST_BYTES: as in cpu.product."""
    folded, constant = fold(x, codes.shape[1], book, signed=True)
    parts = folded.shape[2]
    whole, unit = to_integers(folded)
    limbs = to_limbs(whole)
    sums = limbs.new_empty(len(codes), limbs.shape[1], dtype=torch.int32)
    digits = codes.new_empty(max(LEAST_ROWS, DIGITS // len(limbs)), parts, codes.shape[1])
    signed = digits.view(torch.int8).flatten(1)
    for some, into in zip(codes.split(len(digits)), sums.split(len(digits)), strict=True):
        torch.bitwise_and(some[:, None], _byte_masks(parts), out=digits[: len(some)])
        torch._int_mm(signed[: len(some)], limbs, out=into)
    total = sums.double().view(len(codes), len(x), 4) @ _limb_units()
    total += whole.sum(1).double() @ _offsets(parts, True, x.device).double()
    return (total * unit + constant).float().T


def to_integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """x fp32 [M, ...] -> int32 [M, ...] and the unit of each row of x, fp32 [M], that they are multiples of.

    The unit is a power of two, so that dividing is exact: half a unit, 2^-30 max |x_m|, is lost at most (and 2^-120
    where all of a row is tiny).
    """
    largest = torch.linalg.vector_norm(x.flatten(1), torch.inf, 1).clamp_(min=2.0**-90)
    unit = largest / torch.frexp(largest).mantissa * 2.0**-30
    return (x / unit.view(-1, *[1] * (x.ndim - 1))).round_().int(), unit


def to_limbs(whole: Tensor) -> Tensor:
    """int32 [M, bytes, parts] -> int8 [parts * bytes, 4 M]: columns 4 m to 4 m + 3 are l_0 ... l_3 of row m in

    whole_m = l_0 + 256 l_1 + 256^2 l_2 + 256^3 l_3.
    """
    # With 128 added to every byte at once, then taken off each byte by itself, digits of base 256 are -128 ... 127.
    limbs = ((whole + BYTES_OF_128) ^ BYTES_OF_128).permute(2, 1, 0).clone(memory_format=torch.contiguous_format)
    return limbs.view(-1, len(whole)).view(torch.int8)


def by_sums(x: Tensor, codes: Tensor, book: AffineCodebook) -> Tensor:
    """D x for one row of x: as in cpu.product."""
    folded, constant = fold(x, codes.shape[1], book)
    sums = (folded[0] @ _centred_bytes(folded.shape[2], x.device)).flatten()  # [bytes * 256]: 256 for each place
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


def by_planes(x: Tensor, codes: Tensor, book: AffineCodebook) -> Tensor:
    """D x while a compiler traces the program around it: as in cpu.product."""
    return _sum_of_planes(*_planes(x, codes.shape[1], book), codes)


def by_compiled_planes(x: Tensor, codes: Tensor, book: AffineCodebook) -> Tensor:
    """D x, compiled at the first call: as in cpu.product."""
    planes, constant = _planes(x, codes.shape[1], book)  # few and small steps: called faster than compiled
    if len(x) == 1:
        planes = planes[:, 0]  # compiled by itself, a single row takes two thirds of the time
    return _compiled(_sum_of_planes)(planes, constant, codes).view(len(x), -1)


def _planes(x: Tensor, row_bytes: int, book: AffineCodebook) -> tuple[Tensor, Tensor]:
    folded, constant = fold(x, row_bytes, book)
    constant = constant + folded.sum(1) @ _offsets(folded.shape[2], False, x.device)
    return folded.permute(2, 0, 1).contiguous(), constant


def _sum_of_planes(planes: Tensor, constant: Tensor, codes: Tensor) -> Tensor:
    wide = codes.int()  # widened once, not for each plane; and a sum for each plane, so that none waits for another
    terms = (
        ((wide & mask).float() * plane.unsqueeze(-2)).sum(-1)
        for mask, plane in zip(_masks(len(planes)), planes, strict=True)
    )
    return sum(terms) + constant[:, None]


@lru_cache(maxsize=1)
def _compiled(function):
    # The option: multiply and add in one instruction, which rounds once instead of twice, takes a fifth less time.
    return torch.compile(function, options={"cpp.enable_floating_point_contract_flag": "fast"})


def _masks(planes: int, signed: bool = False) -> list[int]:
    """The parts of a byte, each taken out with one AND: its digits, the first in the highest bits.

    signed: of an int8, where the highest bit counts -128 instead of 128, which makes it a part by itself.
    """
    width = 8 // planes
    digits = [((1 << width) - 1) << 8 - width * (j + 1) for j in range(planes)]
    return [128, *(mask & 127 for mask in digits if mask & 127)] if signed else digits


@made_once
def _factors(planes: int, signed: bool, device: torch.device) -> Tensor:
    """fp32 [planes, parts]: alpha 2^-s where a part belongs to that digit, else 0."""
    alpha = 1.0 if planes == 4 else 2.0
    factors = [
        [alpha / (mask & -mask) if mask & part else 0.0 for part in _masks(planes, signed)] for mask in _masks(planes)
    ]
    factors[0][0] *= -1 if signed else 1
    return torch.tensor(factors, dtype=torch.float32, device=device)  # whatever the default dtype is


@made_once
def _offsets(parts: int, signed: bool, device: torch.device) -> Tensor:
    """o of every part, fp32 [parts]. Of a digit in two parts, the second has it."""
    planes, beta = (8, 1.0) if parts == 8 else (4, 1.5)
    offsets = -beta / _factors(planes, signed, device).sum(0)
    if parts == 5:
        offsets[0] = 0.0
    return offsets


@made_once
def _byte_masks(parts: int) -> Tensor:
    """Masks of the parts of signed bytes, uint8 [parts, 1]: five of four levels, eight of two."""
    return torch.tensor(_masks(4 if parts == 5 else 8, signed=True), dtype=torch.uint8, device="cpu")[:, None]


@made_once
def _limb_units() -> Tensor:
    """256^l, fp64 [4]."""
    return 256.0 ** torch.arange(4, dtype=torch.float64, device="cpu")


@made_once
def _centred_bytes(planes: int, device: torch.device) -> Tensor:
    """v + o of every digit and byte, fp32 [planes, 256]."""
    masks = torch.tensor(_masks(planes), device=device)[:, None]
    return (torch.arange(256, device=device) & masks) + _offsets(planes, False, device)[:, None]


def _padded(x: Tensor, columns: int) -> Tensor:
    """x [M, n] with zeros up to `columns`; x itself if there is nothing to add (F.pad would copy it)."""
    return F.pad(x, (0, columns - x.shape[1])) if columns > x.shape[1] else x
