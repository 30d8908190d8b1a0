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
it takes longer than the dense product, with 256 rows up to half longer. What is gained for certain is memory.

Limits: one row of h has to be multiplied with each weight after it was decoded; kernels/fold.py avoids that.
"""

import math
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codebook.affine import AffineCodebook
from ..codebook.bitstring import unpack_bits
from ..codebook.digits import digits_of
from ..codebook.matrix import Codebook
from ..codebook.trellis import TrellisCodebook

WORKSPACE = 1 << 21  # bytes of decoded weights at a time: they stay in the cache, and parts are few


def by_decoding(h: Tensor, codes: Tensor, book: Codebook) -> Tensor:
    """D h: fp32 [M, in], packed codes uint8 [out, bytes] -> fp32 [M, out]."""
    tables, columns, room = byte_tables(book), h.shape[1], dict[object, Tensor]()
    parts = codes.split(max(1, WORKSPACE // (4 * columns)))
    weights = (_look_up(part, tables, book, room) if tables else decode(part, book, columns) for part in parts)
    y = torch.cat([D[:, :columns] @ h.T for D in weights]).T
    end = row_end(book, columns)
    return y + h[:, columns - len(end) :] @ end[:, None] if len(end) and tables else y


def decode(codes: Tensor, book: Codebook, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """D: packed codes uint8 [rows, bytes] -> weights [rows, columns] of `dtype`, without scales."""
    if not (tables := byte_tables(book)):
        return book.decode(unpack_bits(codes, book.bits, -(-columns // book.dim))).flatten(1)[:, :columns].to(dtype)
    exact, end = dtype if len(tables) == 1 else torch.float32, row_end(book, columns)  # rounded once
    D = _look_up(codes, [table.to(exact) for table in tables], book, {})[:, :columns]
    return (D + F.pad(end, (columns - len(end), 0)) if len(end) else D).to(dtype)


def row_end(book: Codebook, columns: int) -> Tensor:
    """What the last of `columns` weights of a row have more than their bytes say, fp32; empty for most codebooks."""
    if not isinstance(book, TrellisCodebook):
        return torch.empty(0, dtype=torch.float32, device=book.device)
    vectors = -(-columns // book.dim)
    return book.row_end(vectors).flatten()[: columns - max(0, vectors - book.reach) * book.dim]


def byte_tables(book: Codebook) -> list[Tensor]:
    """What each byte adds to the weights of the smallest group of whole vectors, fp32 [256, weights].

    The bytes are those of the group and, where vectors overlap, of the vectors behind it.
    """
    octets, m = torch.arange(256, device=book.device), book.bits
    if 8 % m == 0 and not isinstance(book, TrellisCodebook):
        return [book.decode(unpack_bits(octets.byte()[:, None], m, 8 // m)).flatten(1)]
    vectors = math.lcm(8, m) // m
    if (band := book.band(vectors)) is None:
        return []
    tables = [digits_of(octets, 8, 2) @ rows for rows in F.pad(band, (0, 0, 0, -len(band) % 8)).split(8)]
    if isinstance(book, AffineCodebook):
        tables[0] += book.b.repeat(vectors)
    return tables


def _look_up(codes: Tensor, tables: list[Tensor], book: Codebook, room: dict[object, Tensor]) -> Tensor:
    """uint8 [rows, bytes], `byte_tables` -> [rows, weights], in memory that `room` keeps.

    New memory for each part would cost more than the lookup (page faults).
    """
    count = math.lcm(8, book.bits) // 8  # bytes of a group
    groups = -(-codes.shape[1] // count)
    codes, parts = F.pad(codes, (0, groups * count + len(tables) - count - codes.shape[1])), []
    if torch.jit.is_tracing() or torch.compiler.is_compiling():  # traced programs know neither `out` nor what follows
        octets = (codes[:, i::count][:, :groups].int() for i in range(len(tables)))
        return sum(F.embedding(one, table).flatten(1) for one, table in zip(octets, tables, strict=True))
    for i, table in enumerate(tables):
        octets, one = codes[:, i::count][:, :groups], table
        if table.shape[1] == 4:  # four weights are copied faster as one number of 8 or 16 bytes
            one = table.view(torch.complex128 if table.dtype == torch.float32 else torch.int64).flatten()
        index = room.setdefault(octets.shape, octets.new_empty(octets.shape, dtype=torch.int32)).copy_(octets)
        weights = room.setdefault(("of", i, len(codes)), one.new_empty((index.numel(), *one.shape[1:])))
        parts.append(torch.index_select(one, 0, index.flatten(), out=weights).view(table.dtype).view(len(codes), -1))
    return reduce(Tensor.add_, parts)
