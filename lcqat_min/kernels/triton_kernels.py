"""Triton kernels for packed 2-bit weights, and the choice between them and plain torch.

    dequantize(codes, book, row_scale, columns, dtype)    the dense weight, any number of columns
    packed_linear(x, codes, book, row_scale, ...)         y = W_hat x, with rotation, scales and bias (layer/linear.py)

What has to be moved. A product of one token with a weight of N numbers reads 2 N bytes in bf16, N / 4 in codes:
8 times fewer. A GPU with 4.3 TB/s and 132 multiprocessors at 1.98 GHz then has 1.95 instructions a weight to
spend, of which half may be integer ones. Unpacking a weight the plain way (shift, mask, convert, scale, add,
multiply) takes 9, so reading an eighth of the bytes could gain a factor of 1.7 at most, not 8. Instructions are
what counts, and three consequences of w_hat = A q + b save them:

  1. Fold A into x (kernels/fold.py has the formula): what is left is a product with the digits themselves.
  2. Digits are small integers, and tensor cores multiply 8-bit integers. An AND takes one digit out of four
     bytes at once and the result *is* an operand: no shift, no conversion. A digit at shift s is 2^s too large,
     which x pays for. In the highest digit the sign bit counts: flipping it first makes the byte a two's
     complement number, 2^s c - 128. So a weight costs 1/4 (four levels) or 1/2 (two levels) AND instructions,
     1/16 or 1/8 of a tensor-core instruction, and a share of loads: about 0.9 and 1.3 instructions in all.
  3. x becomes integer too, exactly enough: each number is `limbs` bytes, 7 bits and then 8 bits each, on a scale
     for TILE_BYTES bytes of codes. Limbs take the place of more rows of x, which at batch 1 the tensor core has
     to spare. Two carry more than bf16 or fp16 do, three as much as fp32. Sums in a tile are exact integers, and
     no sum depends on the order of threads: the same input gives the same bits.

A free table has no A to fold: it is decoded. So is a weight for more than FUSED_ROWS rows of x, where the dense
product on tensor cores costs more than decoding: 2.25 bytes a weight moved, 17 instructions allowed. For that
each row of the weight gets a table of its own, the 256 scaled words of four weights, looked up in shared memory:
about 3 instructions a weight.

`scripts/check_kernels.py` counts instructions without a GPU; `scripts/bench_kernels.py` measures on one. The
kernels are plain functions here; `_jit` imports triton at the first launch, so this module needs neither triton
nor a driver. Arithmetic is fp32 or integer, never bf16, which Triton's interpreter computes wrongly. Offsets of
rows are int64. fp32 weights, and vectors that do not fill a byte evenly (d = 3 and d > 4),
have no kernel to decode them; torch does it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..codebook.affine import AffineCodebook
from ..codebook.matrix import Codebook
from ..layer.rotation import rotate, unrotate
from . import decode as cpu

FUSED_ROWS = 16  # rows of x up to which the product is fused; a prediction until bench_kernels.py has run
# Columns of the fused kernel, limbs of rows of x: at least what tensor cores take, at most what registers hold.
LEAST_COLUMNS, MOST_COLUMNS = (16, 16) if torch.version.hip else (8, 32)
TILE_ROWS, TILE_BYTES = 64, 128  # of codes: what one program of the fused kernel takes in one step
PROGRAMS = 512  # programs wanted at least, to fill a GPU: small weights are split along the inputs as well
DECODE_BYTES = 2048  # bytes of a row decoded in one step, at most

triton = tl = None  # imported by _jit


def packed_linear(
    x: Tensor,
    codes: Tensor,
    book: Codebook,
    row_scale: Tensor,
    bias: Tensor | None = None,
    col_scale: Tensor | None = None,
    signs_in: Tensor | None = None,
    signs_out: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """y = s_out * H_out (r * D (H_in (s_in * c * x))) + bias, with D = decode(codes) and the parts of layer/linear.py.

    x [..., in] floating; codes uint8 [out, bytes] as in packing/layer.py; row_scale [out], the rest [in] or [out],
    fp32. Returns [..., out] in the dtype of x. Scales and rotations are computed in fp32. Where x asks for a gradient,
    it gets one (nothing else does), at the price of a dense weight for that call. compiled: on CPUs, few rows
    go through torch.compile. ValueError where shapes or devices disagree, TypeError where x holds integers.
    """
    _check(x, codes, book, row_scale)
    with torch.autocast(x.device.type, enabled=False):
        h = x.float() if col_scale is None else x.float() * col_scale
        h = h if signs_in is None else rotate(h, signs_in)
        y = _product(h.reshape(-1, x.shape[-1]), codes, book, row_scale, x.dtype, compiled)
        y = y if signs_out is None else unrotate(y, signs_out)
        y = y if bias is None else y + bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], len(codes))


def dequantize(codes: Tensor, book: Codebook, row_scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """r * D: codes uint8 [rows, bytes], row_scale fp32 [rows] -> `dtype` [rows, columns], rounded once."""
    if on_gpu(codes) and dtype != torch.float32 and 8 % book.bits == 0:
        weight = cpu.attempt(launch_dequantize, codes, cpu.byte_table(book), row_scale, columns, dtype)
        if weight is not None:
            return weight
    return (cpu.decode(codes, book, columns) * row_scale[:, None]).to(dtype)


def on_gpu(x: Tensor) -> bool:
    """Whether kernels are to be tried: the place of the tensor decides, whatever else the machine has."""
    return x.is_cuda


def _product(h: Tensor, codes: Tensor, book: Codebook, row_scale: Tensor, dtype: torch.dtype, compiled: bool) -> Tensor:
    """r * D h: h fp32 [M, in] -> fp32 [M, out]. dtype: of the activations, which says how exact is exact enough."""
    if torch.jit.is_tracing():  # it sees operations of torch alone, and keeps what is chosen by the number of rows
        return (h @ cpu.decode(codes, book, h.shape[1]).T) * row_scale
    if torch.is_grad_enabled() and h.requires_grad:
        weight = dequantize(codes, book, row_scale, h.shape[1], dtype if on_gpu(h) else torch.float32)
        return (h.to(weight.dtype) @ weight.T).float()
    if not on_gpu(h):
        return cpu.product(h, codes, book, compiled) * row_scale
    if 0 < len(h) <= FUSED_ROWS and isinstance(book, AffineCodebook):
        limbs = 3 if dtype == torch.float32 else 2
        parts = [cpu.attempt(launch_fused, part, codes, book, limbs) for part in h.split(MOST_COLUMNS // limbs)]
        if all(part is not None for part in parts):
            return torch.cat(parts) * row_scale
    return (h.to(dtype) @ dequantize(codes, book, row_scale, h.shape[1], dtype).T).float()


def launch_fused(h: Tensor, codes: Tensor, book: AffineCodebook, limbs: int) -> Tensor:
    """D h by the fold and fused kernels: h fp32 [M, in], codes uint8 [out, bytes] -> fp32 [M, out]."""
    (tokens, inputs), (rows, row_bytes) = h.shape, codes.shape
    width, blocks, columns = (2 if book.levels == 4 else 1), -(-row_bytes // TILE_BYTES), limbs * tokens
    codes = codes.contiguous()
    digits = h.new_empty((8 // width, columns, blocks * TILE_BYTES), dtype=torch.int8)
    scale, constant = h.new_empty((2, columns, blocks)).unbind()
    with torch.cuda.device_of(h):  # Triton launches on the current device
        _jit(fold_kernel)[tokens, blocks](
            h.contiguous(),
            book.A.contiguous(),
            book.b.contiguous(),
            digits,
            scale,
            constant,
            inputs,
            tokens,
            blocks,
            D=book.dim,
            K=book.A.shape[1],
            WIDTH=width,
            LIMBS=limbs,
            BYTES=TILE_BYTES,
        )
    tiles = -(-rows // TILE_ROWS)
    each = -(-blocks // max(1, min(blocks, PROGRAMS // tiles)))
    splits = -(-blocks // each)
    partial = h.new_empty((splits, columns, rows))
    with torch.cuda.device_of(h):
        _jit(fused_kernel)[tiles, splits](
            codes.view(torch.int8),
            digits,
            scale,
            constant,
            partial,
            rows,
            row_bytes,
            blocks,
            columns,
            each,
            WIDTH=width,
            COLUMNS=columns_of(columns),
            ROWS=TILE_ROWS,
            BYTES=TILE_BYTES,
            num_warps=4,
            num_stages=3,
        )
    return partial.view(-1, tokens, rows).sum(0)


def columns_of(count: int) -> int:
    """COLUMNS of the fused kernel for `count` limbs of tokens: a power of two, and one that tensor cores take."""
    return max(LEAST_COLUMNS, 1 << (count - 1).bit_length())


def launch_dequantize(codes: Tensor, table: Tensor, row_scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """row_scale * table[codes] by the dequantize kernel: table fp32 [256, 4] -> fp16 or bf16 [rows, columns]."""
    rows, row_bytes = codes.shape
    weight = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    step = min(DECODE_BYTES, max(128, 1 << (row_bytes - 1).bit_length()))
    with torch.cuda.device_of(codes):
        _jit(dequantize_kernel)[rows,](
            codes.contiguous(), table.contiguous(), row_scale.contiguous(), weight, columns, row_bytes, BYTES=step
        )
    return weight


def fold_kernel(
    x,
    A,
    b,
    digits,
    scale,
    constant,
    inputs,
    tokens,
    blocks,
    D: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    LIMBS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """A^T x of one token for BYTES bytes of codes, as integers: one program a token and block.

    Digit j of a byte stands for q_j = alpha 2^-s v_j + beta_j with v_j = (byte ^ 128) & mask_j, an int8. The factor
    goes into x, as far as the shift within its half byte: the fused kernel adds the two halves apart.
    """
    DIGITS: tl.constexpr = 8 // WIDTH
    token, block = tl.program_id(0), tl.program_id(1)
    byte, place = block * BYTES + tl.arange(0, BYTES)[:, None], tl.arange(0, DIGITS)[None, :]
    number = byte * DIGITS + place  # of the digit, in its row of codes
    vector, k = number // K, number % K
    folded = tl.zeros((BYTES, DIGITS), tl.float32)
    offset = tl.zeros((BYTES, DIGITS), tl.float32)
    for i in tl.static_range(D):
        value = tl.load(x + token.to(tl.int64) * inputs + vector * D + i, mask=vector * D + i < inputs, other=0.0)
        folded += value * tl.load(A + i * K + k)
        offset += tl.where(k == 0, value * tl.load(b + i), 0.0)
    if WIDTH == 1:  # q = 2 c - 1, and the flipped sign bit makes the first one 2 c' + 1
        offset += folded * tl.where(place == 0, 1.0, -1.0)
        folded *= 2.0
    else:  # q = c - 1.5, the first one c' + 0.5
        offset += folded * tl.where(place == 0, 0.5, -1.5)
    folded /= (1 << WIDTH * (DIGITS // 2 - 1 - place % (DIGITS // 2))).to(tl.float32)
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


def fused_kernel(
    codes,
    digits,
    scale,
    constant,
    partial,
    rows,
    row_bytes,
    blocks,
    columns,
    each,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Products of ROWS rows of codes, `each` blocks of them, with all columns (limbs of tokens) of x.

    codes int8 [rows, row_bytes]; digits int8 [8 / WIDTH, columns, blocks * BYTES]; partial fp32 [splits, columns,
    rows]. A digit's sum has at most 128 * 127 * 4 * BYTES < 2^24 in size, so int32 and then fp32 hold it exactly.
    """
    DIGITS: tl.constexpr = 8 // WIDTH
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    start, known = codes + row.to(tl.int64)[:, None] * row_bytes, column < columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(1) * each
    for block in range(first, tl.minimum(first + each, blocks)):
        byte = block * BYTES + tl.arange(0, BYTES)
        code = tl.load(start + byte[None, :], mask=(row < rows)[:, None] & (byte < row_bytes)[None, :], other=0) ^ -128
        high = tl.zeros((ROWS, COLUMNS), tl.int32)  # of the digits in the upper half bytes, 16 times too large
        low = tl.zeros((ROWS, COLUMNS), tl.int32)
        for j in tl.static_range(DIGITS):
            place = (j * columns + column)[None, :] * (blocks * BYTES) + byte[:, None]
            x = tl.load(digits + place, mask=known[None, :], other=0)
            digit = code & (-(1 << 8 - WIDTH) if j == 0 else (256 - (1 << 8 - WIDTH)) >> WIDTH * j)
            if j < DIGITS // 2:
                high = tl.dot(digit, x, high, out_dtype=tl.int32)
            else:
                low = tl.dot(digit, x, low, out_dtype=tl.int32)
        unit = tl.load(scale + column * blocks + block, mask=known, other=0.0)
        shift = tl.load(constant + column * blocks + block, mask=known, other=0.0)
        total += (high.to(tl.float32) * 0.0625 + low.to(tl.float32)) * unit[None, :] + shift[None, :]
    out = partial + (tl.program_id(1) * columns + column).to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(out, total, mask=(row < rows)[:, None] & known[None, :])


def dequantize_kernel(codes, table, row_scale, weight, columns, row_bytes, BYTES: tl.constexpr):
    """One row: scale the table, round it, pack it to 256 words of four weights; then one lookup for each byte."""
    half = weight.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    r = tl.load(row_scale + row)
    words = tl.zeros((256,), tl.int64)
    for i in tl.static_range(4):
        rounded = (tl.load(table + tl.arange(0, 256) * 4 + i) * r).to(half).to(tl.int16, bitcast=True)
        words |= (rounded.to(tl.int64) & 0xFFFF) << 16 * i
    for first in range(0, row_bytes, BYTES):
        byte = first + tl.arange(0, BYTES)
        code = tl.load(codes + row * row_bytes + byte, mask=byte < row_bytes, other=0).to(tl.int32)
        four = tl.gather(words, code, 0)
        even = tl.join(four.to(tl.int16), (four >> 32).to(tl.int16))
        odd = tl.join((four >> 16).to(tl.int16), (four >> 48).to(tl.int16))
        column = first * 4 + tl.arange(0, BYTES * 4)
        value = tl.reshape(tl.join(even, odd), (BYTES * 4,)).to(half, bitcast=True)
        tl.store(weight + row * columns + column, value, mask=column < columns)


@lru_cache(maxsize=8)
def _jit(kernel):
    """The kernel, ready to launch or to compile. Imports triton: ImportError where it is not installed."""
    global triton, tl
    import triton
    import triton.language as tl

    return triton.jit(kernel)


def _check(x: Tensor, codes: Tensor, book: Codebook, row_scale: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(
            f"packed_linear: x is {x.dtype}. The model casts the inputs of this layer to weight.dtype, but "
            "the weight of a packed layer are its codes: name it in QuantConfig.skip and quantize again."
        )
    row_bytes = -(-(-(-x.shape[-1] // book.dim) * book.bits) // 8)
    if codes.dtype != torch.uint8 or codes.ndim != 2 or codes.shape[1] != row_bytes:
        raise ValueError(
            f"packed_linear: codes are {codes.dtype} {list(codes.shape)}; {x.shape[-1]} inputs in vectors of "
            f"{book.dim} at {book.bits} bits want uint8 [out, {row_bytes}]. Pack them with packed.pack_bits."
        )
    if row_scale.shape != codes.shape[:1]:
        raise ValueError(
            f"packed_linear: row_scale has shape {list(row_scale.shape)}; "
            f"want [{codes.shape[0]}], one number a row of codes"
        )
    places = {"x": x.device, "codes": codes.device, "row_scale": row_scale.device, "codebook": cpu.device_of(book)}
    if len(set(places.values())) > 1:
        found = ", ".join(f"{name} on {place}" for name, place in places.items())
        raise ValueError(f"packed_linear: {found}; move all to one device with .to().")
