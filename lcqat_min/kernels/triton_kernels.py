"""Triton kernels for packed 2-bit weights: a fused product of few rows of x with codes, and the decoding of codes.

What has to be moved. A product of one token with a weight of N numbers reads 2 N bytes in bf16, N / 4 in codes:
8 times fewer. A GPU with 4.3 TB/s and 132 multiprocessors at 1.98 GHz then has 1.95 instructions per weight to
spend, of which half may be integer ones. Unpacking a weight the plain way (shift, mask, convert, scale, add,
multiply) takes 9, so reading an eighth of the bytes could gain a factor of 1.7 at most, not 8. Instructions are
what counts, and three consequences of w_hat = A q + b with q = -1 or +1 save them:

  1. Fold A into x (kernels/fold.py has the formula): what is left is a product with the digits themselves.
  2. Digits are small integers, and tensor cores multiply 8-bit integers. An AND takes one digit out of four
     bytes at once and the result *is* an operand: no shift, no conversion. A digit at shift s is 2^s too large,
     which x pays for. In the highest digit the sign bit counts: flipping it first makes the byte a two's
     complement number. So a weight costs 1/2 AND instruction, 1/8 of a tensor-core instruction, and a share of loads.
  3. x becomes integer too, exactly enough: each number is `limbs` bytes, 7 bits and then 8 bits each, on a scale
     for TILE_BYTES bytes of codes. Limbs take the place of more rows of x, which at batch 1 the tensor core has
     to spare. Two carry more than bf16 or fp16 do, three as much as fp32. Sums in a tile are exact integers, and
     no sum depends on the order of threads: the same input gives the same bits.

A table has no A to fold: it is decoded. So is a weight for many rows of x, where the dense product on tensor cores
costs more than decoding. `dequantize_kernel` decodes to 16 bits, `windows_kernel` where vectors reach into later bytes;
plain torch (kernels/decode.py) decodes to 32 bits.

`scripts/check_kernels.py` counts instructions without a GPU (results/kernels_aot.json); `scripts/bench_kernels.py`
measures on one. This module needs triton but no driver; kernels/product.py imports it where a tensor is on a GPU.

Limits: arithmetic is fp32 or integer, never bf16, which Triton's interpreter computes wrongly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook.affine import AffineCodebook

# Columns of the fused kernel, limbs of rows of x: as few as tensor cores take, as many as registers hold.
LEAST_COLUMNS, MOST_COLUMNS = (16, 16) if torch.version.hip else (8, 32)
TILE_ROWS, TILE_BYTES = 64, 128  # of codes: what one program of the fused kernel takes in one step
DECODE_BYTES = 1024  # of codes: what one program of the dequantize kernel takes
PROGRAMS = 512  # programs wanted, to fill a GPU: small weights are split along the inputs as well


def launch_fused(h: Tensor, codes: Tensor, planes: AffineCodebook, limbs: int) -> Tensor:
    """D h by the fold and fused kernels: h fp32 [M, in], packed codes uint8 [out, bytes] -> fp32 [M, out]."""
    if len(h) > (most := MOST_COLUMNS // limbs):
        return torch.cat([launch_fused(part, codes, planes, limbs) for part in h.split(most)])
    (tokens, inputs), (rows, row_bytes) = h.shape, codes.shape
    blocks, columns = triton.cdiv(row_bytes, TILE_BYTES), limbs * tokens
    digits = h.new_empty((8, columns, blocks * TILE_BYTES), dtype=torch.int8)
    scale, constant = h.new_empty((2, columns, blocks)).unbind()
    tiles = triton.cdiv(rows, TILE_ROWS)
    each = triton.cdiv(blocks, max(1, min(blocks, PROGRAMS // tiles)))  # blocks for one program
    partial = h.new_empty((triton.cdiv(blocks, each), columns, rows))
    A, b, codes = planes.A.contiguous(), planes.b.contiguous(), codes.contiguous().view(torch.int8)
    sizes = {"D": planes.dim, "K": planes.bits, "LIMBS": limbs, "BYTES": TILE_BYTES}
    tile = {"COLUMNS": max(LEAST_COLUMNS, triton.next_power_of_2(columns)), "ROWS": TILE_ROWS, "BYTES": TILE_BYTES}
    with torch.cuda.device_of(h):  # Triton launches on the current device
        fold_kernel[tokens, blocks](h.contiguous(), A, b, digits, scale, constant, inputs, tokens, blocks, **sizes)
        counts = (rows, row_bytes, blocks, columns, each)
        fused_kernel[tiles, len(partial)](codes, digits, scale, constant, partial, *counts, **tile)
    return partial.view(-1, tokens, rows).sum(0)


def launch_dequantize(codes: Tensor, table: Tensor, columns: int) -> Tensor:
    """table[codes]: packed codes uint8 [rows, bytes], table fp16 or bf16 [256, 4] -> its dtype, [rows, columns]."""
    words = torch.empty(codes.shape, dtype=torch.int64, device=codes.device)
    with torch.cuda.device_of(codes):
        programs = (triton.cdiv(codes.numel(), DECODE_BYTES),)
        dequantize_kernel[programs](codes.contiguous(), table.view(torch.int64), words, codes.numel(), DECODE_BYTES)
    return words.view(table.dtype)[:, :columns]


def launch_windows(codes: Tensor, tables: Tensor, end: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Sums of tables for codes whose vectors reach into later bytes: uint8 [rows, bytes] -> `dtype` [rows, columns].

    tables: fp32 [bytes in a window, 256, weights of a byte]; end: fp32, added to the last weights of each row.
    """
    out = torch.empty(len(codes), columns, dtype=dtype, device=codes.device)
    sizes = {"WINDOW": len(tables), "W": tables.shape[2], "BYTES": DECODE_BYTES // tables.shape[2]}
    with torch.cuda.device_of(codes):
        programs = (len(codes), triton.cdiv(codes.shape[1], sizes["BYTES"]))
        given = (codes.contiguous(), tables.contiguous(), end.contiguous(), out)
        windows_kernel[programs](*given, codes.shape[1], columns, len(end), **sizes)
    return out


@triton.jit
def fold_kernel(
    x, A, b, digits, scale, constant, inputs, tokens, blocks,
    D: tl.constexpr, K: tl.constexpr, LIMBS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """A^T x of one token for BYTES bytes of codes, as integers: one program per token and block.

    Digit j of a byte is q_j = 2^(1-s) v_j - 1 with v_j = (byte ^ 128) & mask_j, an int8 (q_0 = ... + 1). The factor
    goes into x, as far as the shift within its half byte: the fused kernel adds the two halves apart.
    """
    token, block = tl.program_id(0), tl.program_id(1)
    byte, place = block * BYTES + tl.arange(0, BYTES)[:, None], tl.arange(0, 8)[None, :]
    number = byte * 8 + place  # of the digit, in its row of codes
    vector, k = number // K, number % K
    folded, offset = tl.zeros((BYTES, 8), tl.float32), tl.zeros((BYTES, 8), tl.float32)
    for i in tl.static_range(D):
        value = tl.load(x + token.to(tl.int64) * inputs + vector * D + i, mask=vector * D + i < inputs, other=0.0)
        folded += value * tl.load(A + i * K + k)
        offset += tl.where(k == 0, value * tl.load(b + i), 0.0)
    offset += tl.where(place == 0, folded, -folded)
    folded *= 2.0 / (8 >> place % 4).to(tl.float32)
    unit = tl.maximum(tl.max(tl.max(tl.abs(folded), 1), 0), 1e-30) / 127.0
    total = tl.sum(tl.sum(offset, 1), 0)  # not finite where x is not, so that y shows it
    rest = folded / unit
    for limb in tl.static_range(LIMBS):
        row = limb * tokens + token
        whole = tl.floor(rest + 0.5)
        tl.store(digits + (place * (LIMBS * tokens) + row) * (blocks * BYTES) + byte, whole.to(tl.int8))
        tl.store(scale + row * blocks + block, unit)
        tl.store(constant + row * blocks + block, total)
        rest, unit, total = (rest - whole) * 254.0, unit / 254.0, total * 0.0


@triton.jit
def fused_kernel(
    codes, digits, scale, constant, partial, rows, row_bytes, blocks, columns, each,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Products of ROWS rows of codes, `each` blocks of them, with all columns (limbs of tokens) of x.

    codes int8 [rows, row_bytes]; digits int8 [8, columns, blocks * BYTES]; partial fp32 [splits, columns, rows].
    A sum of four digits has at most 255 * 127 * BYTES < 2^24 in size, so int32 and then fp32 hold it exactly.
    Offsets of rows are int64.
    """
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    start, known = codes + row.to(tl.int64)[:, None] * row_bytes, column < columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(1) * each
    for block in range(first, tl.minimum(first + each, blocks)):
        byte = block * BYTES + tl.arange(0, BYTES)
        code = tl.load(start + byte[None, :], mask=(row < rows)[:, None] & (byte < row_bytes)[None, :], other=0) ^ -128
        # Sums of the digits in the upper half bytes, which are 16 times too large, and in the lower ones.
        high, low = tl.zeros((ROWS, COLUMNS), tl.int32), tl.zeros((ROWS, COLUMNS), tl.int32)
        for j in tl.static_range(8):
            place = (j * columns + column)[None, :] * (blocks * BYTES) + byte[:, None]
            x = tl.load(digits + place, mask=known[None, :], other=0)
            digit = code & (-128 if j == 0 else 128 >> j)
            if j < 4:
                high = tl.dot(digit, x, high, out_dtype=tl.int32)
            else:
                low = tl.dot(digit, x, low, out_dtype=tl.int32)
        unit = tl.load(scale + column * blocks + block, mask=known, other=0.0)
        shift = tl.load(constant + column * blocks + block, mask=known, other=0.0)
        total += (high.to(tl.float32) * 0.0625 + low.to(tl.float32)) * unit[None, :] + shift[None, :]
    out = partial + (tl.program_id(1) * columns + column).to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(out, total, mask=(row < rows)[:, None] & known[None, :])


@triton.jit
def dequantize_kernel(codes, table, words, count, BYTES: tl.constexpr):
    """words[i] = table[codes[i]]: a byte of codes becomes four weights of 16 bits, one word. Offsets are int64."""
    place = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    code = tl.load(codes + place, mask=place < count, other=0).to(tl.int32)
    tl.store(words + place, tl.load(table + code), mask=place < count)


@triton.jit
def windows_kernel(
    codes, tables, end, out, row_bytes, columns, ends,
    WINDOW: tl.constexpr, W: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """BYTES bytes of one row become W weights each: the sum over a window of WINDOW bytes, rounded once.

    Bytes behind the row count as zeros, as the unused bits of its last byte do; `end` makes up for both.
    """
    row = tl.program_id(0).to(tl.int64)
    byte, place = tl.program_id(1) * BYTES + tl.arange(0, BYTES)[:, None], tl.arange(0, W)[None, :]
    value = tl.zeros((BYTES, W), tl.float32)
    for i in tl.static_range(WINDOW):
        code = tl.load(codes + row * row_bytes + byte + i, mask=byte + i < row_bytes, other=0).to(tl.int32)
        value += tl.load(tables + (i * 256 + code) * W + place)
    column = byte * W + place
    from_end = column - (columns - ends)
    value += tl.load(end + from_end, mask=(from_end >= 0) & (from_end < ends), other=0.0)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=column < columns)
