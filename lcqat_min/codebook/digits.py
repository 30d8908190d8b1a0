"""The index layout: an m-bit index and its digits, shared by codebooks, layers, packed files and kernels.

    index   0 ... 2^m - 1, any integer type
    digits  q [k], fp32, centred at zero: -1, +1 (2 levels, one bit each) or -1.5, -0.5, 0.5, 1.5 (4 levels, two)

Digits are big-endian: digit 0 sits in the highest bits. For d = 4 weights at 2 bits the index is one byte: eight
digits of two levels, or four of four. Negating every digit maps index i to 2^m - 1 - i.
"""

import torch
from torch import Tensor


def digits_of(index: Tensor, count: int, levels: int) -> Tensor:
    """Index (integers [...]) -> centred digits, fp32 [..., count]: -1, +1 (2 levels) or -1.5 ... +1.5 (4)."""
    width = levels.bit_length() - 1
    shifts = torch.arange(count - 1, -1, -1, device=index.device) * width
    q = (index.long().unsqueeze(-1) >> shifts) & (levels - 1)
    return (2 * q - 1).float() if levels == 2 else q.float() - (levels - 1) / 2


def index_of(digits: Tensor, levels: int) -> Tensor:
    """Inverse of digits_of: centred digits [..., count] -> int64 index [...]."""
    width = levels.bit_length() - 1
    q = (digits > 0).long() if levels == 2 else (digits + (levels - 1) / 2).round().long()
    shifts = torch.arange(digits.shape[-1] - 1, -1, -1, device=digits.device) * width
    return (q << shifts).sum(-1)
