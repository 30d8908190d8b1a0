"""The reference product with packed codes, in plain torch: decode a few rows, multiply, go on.

    y = D h        D = decode(codes) [out, in]: WORKSPACE bytes of it at a time, never all

Decoding is a lookup. At 2 bits per weight and d = 1, 2 or 4 a byte of codes stands for four weights, so one table of
256 entries, made from the codebook for each product, decodes any codebook of this size; its form makes no difference.
Vectors that do not fill a byte evenly (d = 3, d > 4) are decoded by the formula of their codebook.

A lookup takes as long for one row of h as for many. `scripts/bench_kernels.py --cpu` measures the product against the
dense fp32 product, and generation with the bundled model, and stores both in results/packed_cpu.json: with one row of h
it takes longer than the dense product, with 256 rows about as long. What is gained for certain is memory.

Limits: one row of h has to be multiplied with each weight after it was decoded; kernels/fold.py avoids that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codebook.affine import AffineCodebook
from ..codebook.bitstring import unpack_bits
from ..codebook.matrix import Codebook

WORKSPACE = 1 << 23  # bytes of decoded weights at a time: they stay in the cache, and parts are few


def by_decoding(h: Tensor, codes: Tensor, book: Codebook) -> Tensor:
    """D h: fp32 [M, in], packed codes uint8 [out, bytes] -> fp32 [M, out]."""
    rows = max(1, WORKSPACE // (4 * h.shape[1]))
    return torch.cat([decode(part, book, h.shape[1]) @ h.T for part in codes.split(rows)]).T


def decode(codes: Tensor, book: Codebook, columns: int) -> Tensor:
    """D: packed codes uint8 [rows, bytes] -> weights fp32 [rows, columns], without scales."""
    vectors = -(-columns // book.dim)
    if 8 % book.bits == 0:
        weights = _look_up(codes, byte_table(book))
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


def _look_up(codes: Tensor, table: Tensor) -> Tensor:
    """uint8 [rows, bytes], fp32 [256, w] -> fp32 [rows, bytes * w]."""
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if table.shape[1] != 4 or codes.device.type != "cpu" or traced:
        return F.embedding(codes.int(), table).flatten(1)
    # One number of 16 bytes is copied faster than four of 4 bytes. Programs that trace this know no such numbers.
    four = table.contiguous().view(torch.complex128).flatten()
    return four.index_select(0, codes.int().flatten()).view(torch.float32).view(len(codes), -1)
