"""The reference product with packed codes, in plain torch: decode a few rows, multiply, go on.

    y = D h        D = decode(codes) [out, in]: WORKSPACE bytes of it at a time, never all

Decoding is a lookup. At 2 bits per weight and d = 1, 2 or 4 a byte of codes stands for four weights, so one table of
256 entries, made from the codebook for each product, decodes any codebook of this size; its form makes no difference.
Vectors that do not fill a byte evenly (d = 3, d > 4) are decoded by their formula, or by a table of all vectors.

`scripts/bench_kernels.py --cpu` measures what this costs against the dense fp32 product and stores it in
results/packed_cpu.json. A lookup takes as long for one row of h as for many. So one row takes longer than the dense
product, and 256 rows take about as long. What is gained for certain is memory.

Limits: every weight is made, written to the cache and read again. kernels/fold.py avoids that for affine codebooks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codebook.affine import AffineCodebook
from ..codebook.bitstring import unpack_bits
from ..codebook.matrix import Codebook

WORKSPACE = 1 << 22  # bytes to decode into, used again and again: fresh memory costs as much as the lookups


@torch.no_grad()
def by_decoding(h: Tensor, codes: Tensor, book: Codebook) -> Tensor:
    """D h: fp32 [M, in], packed codes uint8 [out, bytes] -> fp32 [M, out], without gradient."""
    return torch.cat([D @ h.T for D in _some_rows(codes, book, h.shape[1])]).T


def _some_rows(codes: Tensor, book: Codebook, columns: int) -> Iterator[Tensor]:
    """decode() of a few rows at a time. Take each before the next one is made: bytes go into the same memory."""
    rows = max(1, WORKSPACE // (4 * columns))
    if 8 % book.bits:
        yield from (decode(part, book, columns) for part in codes.split(rows))
        return
    table = byte_table(book).contiguous()
    if table.is_cpu and table.shape[1] % 4 == 0:
        table = table.view(torch.complex128).squeeze(1)  # one number of 16 bytes is copied faster than four of 4
    memory = table.new_empty(rows * codes.shape[1], *table.shape[1:])
    for part in codes.split(rows):
        found = torch.index_select(table, 0, part.int().flatten(), out=memory[: part.numel()])
        yield found.view(torch.float32).view(len(part), -1)[:, :columns]


def decode(codes: Tensor, book: Codebook, columns: int) -> Tensor:
    """D: packed codes uint8 [rows, bytes] -> weights fp32 [rows, columns], without scales."""
    vectors = -(-columns // book.dim)
    if 8 % book.bits == 0:
        weights = F.embedding(codes.int(), byte_table(book)).flatten(1)
    elif (planes := book.as_planes()) is not None:
        signs = decode(codes, one_bit(codes.device), vectors * book.bits).unflatten(1, (vectors, book.bits))
        weights = (signs @ planes.A.T + planes.b).flatten(1)
    else:
        weights = book.decode(unpack_bits(codes, book.bits, vectors)).flatten(1)
    return weights[:, :columns]


def byte_table(book: Codebook) -> Tensor:
    """The weights of every byte, fp32 [256, 8 d / m], for codebooks whose m-bit indices fill a byte evenly."""
    octets = torch.arange(256, dtype=torch.uint8, device=book.device)[:, None]
    return book.decode(unpack_bits(octets, book.bits, 8 // book.bits)).flatten(1)


def one_bit(device: torch.device) -> AffineCodebook:
    """The codebook whose weights are the bits themselves, as -1 and +1."""
    fp32 = {"dtype": torch.float32, "device": device}
    return AffineCodebook(torch.ones(1, 1, **fp32), torch.zeros(1, **fp32), 2)
