"""The reference product with packed codes, in plain torch: decode a few rows, multiply, go on.

    y = D h        D = decode(codes) [out, in]: WORKSPACE bytes of it at a time, never all

Decoding is a lookup. At 2 bits per weight a byte of codes stands for four weights. For d = 1, 2 or 4 these are whole
vectors: one table of 256 entries, made from the codebook for each product, decodes them, and the form of the codebook
makes no difference. With d = 3 or d > 4 a byte holds parts of vectors. But w = A q + b is a sum over digits, so it is
also a sum over bytes: each byte in a group of whole vectors has a table of its own, with what its digits add to the
weights of the group (2 tables for d = 8, 3 for d = 3). A free table has no such sum; if its indices do not fill bytes,
they are decoded one by one.

A lookup takes as long for one row of h as for many. `scripts/bench_kernels.py --cpu` measures the product against the
dense fp32 product, and generation with the bundled model, and stores both in results/packed_cpu.json: with one row of h
it takes longer than the dense product, with 256 rows about as long. What is gained for certain is memory.

Limits: one row of h has to be multiplied with each weight after it was decoded; kernels/fold.py avoids that.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codebook.bitstring import unpack_bits
from ..codebook.digits import digits_of
from ..codebook.matrix import Codebook

WORKSPACE = 1 << 22  # bytes of decoded weights at a time: they stay in the cache, and parts are few


def by_decoding(h: Tensor, codes: Tensor, book: Codebook) -> Tensor:
    """D h: fp32 [M, in], packed codes uint8 [out, bytes] -> fp32 [M, out]."""
    rows = max(1, WORKSPACE // (4 * h.shape[1]))
    return torch.cat([decode(part, book, h.shape[1]) @ h.T for part in codes.split(rows)]).T


def decode(codes: Tensor, book: Codebook, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """D: packed codes uint8 [rows, bytes] -> weights [rows, columns] of `dtype`, without scales."""
    tables = byte_tables(book)
    if not tables:
        index = unpack_bits(codes, book.bits, -(-columns // book.dim))
        return book.decode(index).flatten(1)[:, :columns].to(dtype)
    codes = F.pad(codes, (0, -codes.shape[1] % len(tables)))
    exact = dtype if len(tables) == 1 else torch.float32  # rounded once
    parts = [_look_up(codes[:, i :: len(tables)], table.to(exact)) for i, table in enumerate(tables)]
    return sum(parts[1:], parts[0])[:, :columns].to(dtype)


def byte_tables(book: Codebook) -> list[Tensor]:
    """What each byte of the smallest group of whole vectors adds to the weights of the group, fp32 [256, weights]."""
    octets, m = torch.arange(256, device=book.device), book.bits
    if 8 % m == 0:
        return [book.decode(unpack_bits(octets.byte()[:, None], m, 8 // m)).flatten(1)]
    if (planes := book.as_planes()) is None:
        return []
    digits, count = digits_of(octets, 8, 2), math.lcm(8, m) // 8
    alone = [F.pad(digits, (8 * i, 8 * (count - 1 - i))).unflatten(1, (-1, m)) for i in range(count)]
    return [(q @ planes.A.T + planes.b / count).flatten(1) for q in alone]


def _look_up(codes: Tensor, table: Tensor) -> Tensor:
    """uint8 [rows, bytes], [256, w] -> [rows, bytes * w]."""
    if table.shape[1] != 4 or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return F.embedding(codes.int(), table).flatten(1)
    # Four weights are copied faster as one number of 8 or 16 bytes. Programs that trace this know no such numbers.
    fours = table.view(torch.complex128 if table.dtype == torch.float32 else torch.int64).flatten()
    return fours.index_select(0, codes.int().flatten()).view(table.dtype).view(len(codes), -1)
