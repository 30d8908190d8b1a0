"""Indices as bytes: each row of m-bit indices is one big-endian bit string, padded with zeros to a whole byte.

So at 2 bits per weight a byte holds four weights, the first in the highest bits. A row that ends within a byte costs up
to 7 bits. Both functions are plain torch: to be read, and to check the products with packed codes against.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def pack_bits(index: Tensor, bits: int) -> Tensor:
    """Integers below 2^bits, [rows, count] -> uint8 [rows, ceil(count * bits / 8)], big-endian. bits: at most 16."""
    shifts = torch.arange(bits - 1, -1, -1, dtype=torch.int32, device=index.device)
    string = (index.int().unsqueeze(-1) >> shifts & 1).flatten(1)
    octets = F.pad(string, (0, -string.shape[1] % 8)).unflatten(1, (-1, 8))
    return (octets << torch.arange(7, -1, -1, dtype=torch.int32, device=index.device)).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of pack_bits: uint8 [rows, bytes] -> int64 [rows, count]."""
    if 8 % bits == 0:  # whole indices in each byte
        shifts = torch.arange(8 - bits, -1, -bits, device=packed.device)
        return (packed.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(1)[:, :count]
    begin = torch.arange(count, device=packed.device) * bits
    first, offset = begin // 8, begin % 8
    wide = F.pad(packed, (0, 2)).long()  # an index lies within three bytes
    three = wide[:, first] << 16 | wide[:, first + 1] << 8 | wide[:, first + 2]
    return three >> (24 - bits - offset) & ((1 << bits) - 1)
