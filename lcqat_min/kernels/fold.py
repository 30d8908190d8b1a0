"""Products with packed codes that never make a weight: A is folded into x. For few rows of x, in plain torch.

With D = A q + b for each vector of d weights, q its m digits of -1 or +1, and x_g the inputs of vector g, a row of
D x is

             y = sum_g (A q_g + b)^T x_g = sum_g q_g^T (A^T x_g)  +  sum_g b^T x_g

so A goes into x once, for all rows of D (`fold`). What is left is a product with signs: y adds or subtracts one number
of x' = A^T x for each bit of the codes. A table of free vectors has no A to fold.

Every affine codebook has this form. A digit of four levels is q = hi + lo / 2 with hi, lo = -1 or +1, so the scalar
grid and the lattice are planes, too, exactly and index by index (`AffineCodebook.as_planes`).

`sum_of_signs` makes one sum for each of the eight bits of a byte. Done step by step, that is slower than decoding
(kernels/decode.py), because every step writes its result. A compiler makes one loop of it: either one that traces the
program around it, or torch.compile, called here. The kernels for GPUs do the same in integers
(kernels/triton_kernels.py).

Limits: torch.compile needs a C++ compiler and takes seconds at the first call.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codebook.affine import AffineCodebook

HALVES = [2.0 ** (6 - bit) for bit in range(8)]


def fold(x: Tensor, row_bytes: int, planes: AffineCodebook) -> tuple[Tensor, Tensor]:
    """x fp32 [M, in] -> x' = A^T x, one number for each bit of a row of codes, [M, 8 bytes]; sum_g b^T x_g, [M]."""
    vectors = F.pad(x, (0, -x.shape[1] % planes.dim)).unflatten(1, (-1, planes.dim))
    folded = (vectors @ planes.A).flatten(1)
    return F.pad(folded, (0, 8 * row_bytes - folded.shape[1])), vectors.sum(1) @ planes.b


def sum_of_signs(parts: Tensor, codes: Tensor) -> Tensor:
    """x' / half by bit, fp32 [8, M, bytes], the first bit the highest; packed codes uint8 [out, bytes] -> [M, out].

    half: of the value of the bit in its byte, so (bit - half) / half is -1 or +1, exactly.
    """
    codes = codes.int()  # widened once, not for each bit
    return sum(  # a sum for each bit, so that none waits for another
        (((codes & 128 >> bit).float() - half) * part.unsqueeze(1)).sum(-1)
        for bit, (half, part) in enumerate(zip(HALVES, parts, strict=True))
    )


def by_planes(x: Tensor, codes: Tensor, planes: AffineCodebook, compiled: bool = False) -> Tensor:
    """D x: fp32 [M, in], packed codes uint8 [out, bytes] -> fp32 [M, out]. compiled: here, at the first call."""
    folded, constant = fold(x, codes.shape[1], planes)  # few and small steps: called faster than compiled
    multiply = _compiled(sum_of_signs) if compiled else sum_of_signs
    parts = folded.unflatten(1, (-1, 8)) / torch.tensor(HALVES, dtype=x.dtype, device=x.device)
    return multiply(parts.permute(2, 0, 1).contiguous(), codes) + constant[:, None]


_compiled = cache(torch.compile)
