"""Block-Hadamard rotation with random signs: spread outliers before rounding, and undo it exactly after.

A rotation of a vector x in R^n is R x = U (s * x): flip signs by s in {-1, +1}^n, then mix each block of
B = 2^p coordinates by the orthonormal Sylvester-Hadamard matrix U_B (entries +-1/sqrt(B), symmetric, its own
inverse).

    U_1 = [1]        U_2B = 1/sqrt(2) [ U_B   U_B ]
                                      [ U_B  -U_B ]

One large weight becomes B weights of 1/sqrt(B) its size, so a 4-level grid no longer has to stretch to reach
it. Both sides of a layer y = W x can be rotated; in the rotated basis the weight is

    W_r = U_out (s_out * W * s_in) U_in          W = s_out * (U_out W_r U_in) * s_in

(QuIP#, UniSVQ; LC-QAT's release fixes B = 128.) B is the largest power of two that divides the width, at most
MAX_BLOCK. An odd width has B = 1: nothing is mixed and only signs flip.

Here rotations act on the *weight*, by a matmul with a small +-1 matrix: for many tokens and a small model
that is cheaper than rotating activations, and it keeps less for backward.

Limits: after mixing, weights are close to independent and normal, so hardly any correlation within a vector of weights
is left for a learned A.
"""

import torch
from torch import Tensor

MAX_BLOCK = 128
KEPT: dict[tuple, Tensor] = {}  # matrices that `hadamard` has made


def block_of(width: int) -> int:
    """B, the largest power of two that divides `width`, at most MAX_BLOCK. Raises ValueError below 1."""
    if width < 1:
        raise ValueError(f"a rotation needs a width of at least 1; got {width}")
    return min(width & -width, MAX_BLOCK)


def hadamard(size: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
    """Orthonormal Sylvester-Hadamard matrix [size, size], made once and shared by all callers: do not write to it.

    Raises ValueError where `size` is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Sylvester-Hadamard matrix has 2^p rows; got {size}. Use block_of(width).")
    if (size, dtype, device) in KEPT:
        return KEPT[size, dtype, device]
    with torch.inference_mode(False):  # a matrix that is first needed in an evaluation must also serve training
        U = torch.ones(1, 1, dtype=torch.float64)
        while len(U) < size:
            U = torch.cat([torch.cat([U, U], dim=1), torch.cat([U, -U], dim=1)])
        U = (U / size**0.5).to(dtype=dtype, device=device)
    if type(U) is Tensor:  # a program that is traced (torch.export, FakeTensorMode) makes a tensor without numbers
        KEPT[size, dtype, device] = U
    return U


def mix(x: Tensor) -> Tensor:
    """Multiply the last dimension of x [..., n] by the block-diagonal Hadamard matrix. Its own inverse."""
    block = block_of(x.shape[-1])
    return (x.reshape(-1, block) @ hadamard(block, x.dtype, x.device)).reshape(x.shape)


def random_signs(width: int, generator: torch.Generator) -> Tensor:
    """s: fp32 [width] of -1 and +1, on the CPU, so that one seed gives the same signs for every device."""
    return (2 * torch.randint(0, 2, (width,), generator=generator) - 1).float()


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """R x along the last dimension: x [..., n], signs [n]."""
    return mix(x * signs)


def unrotate(x: Tensor, signs: Tensor) -> Tensor:
    """Inverse of `rotate`: x [..., n], signs [n]."""
    return mix(x) * signs
