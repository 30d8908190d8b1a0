"""Codebooks of 2 bits per weight: one formula, and the lookup table that it replaces.

A codebook turns an m-bit index into a vector of d weights. At 2 bits per weight m = 2 d.

    affine   w_hat = A q + b     A [d, k], b [d], q: digits    (LC-QAT, arXiv 2606.10531; UniSVQ, 2606.10520)
    table    w_hat = T[index]    T [2^m, d]                  (k-means, LBG; what AQLM and GPTVQ store)

`q` holds k digits of two or four levels each, centred at zero. Three affine codebooks differ only in A and in the
levels. The mean squared error (MSE) is that of fresh weights, drawn like those of the fit;
tests/codebook/test_codebook.py measures it.

    name          d   k  lev. digits                 learned numbers   MSE on N(0,1)
    scalar        1   1   4   -1.5 -0.5 +0.5 +1.5       2               0.119
    tied planes   4   4   4   the same                 20               0.119    the paper's, z = q + 1.5
    untied planes 4   8   2   -1 +1                    36               0.098    frame_planes
    untied planes 8  16   2   -1 +1                   136               0.092
    free table    4   -   -   none: a lookup         1024               0.098

Untied planes without b, one A for the whole model, are LiftQuant (arXiv 2606.04050), published independently.

Why the names: a digit of four levels is two bits, q = hi + lo/2 with hi, lo in {-1, +1}, so the paper's
codebook is [A, A/2] applied to two bit-planes: the low plane is *tied* to half of the high plane. All its
codewords form a sheared cube. Shear can pack space more densely (the lattice D4 is a sheared cube), but it
also drives the corners out to where hardly any weight lies, and at four levels per side that costs what the
packing gains: on independent normal weights the fitted A is close to orthogonal, whatever the start, and that
is scalar rounding in a turned basis. *Untie* the planes (let A be d x 2d) and the same bits reach a codebook
that is shaped like the data. It still has no table: decoding is one tiny matrix product, differentiable in A,
b and q.

Limits: encoding is a search (exact up to 8 bits, by halves above), since A is not orthogonal.
Scales are not part of a codebook: it serves weights of about unit variance, the layer keeps the scales.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from .digits import digits_of
from .matrix import LinearCodebook
from .search import Search, nearest_level

FP32 = torch.float32  # whatever the default dtype is
EXACT_BITS = 8  # up to 256 codewords are searched one by one


@dataclass(frozen=True)
class AffineCodebook(LinearCodebook):
    """w_hat = A q + b.  A: fp32 [d, k]; b: fp32 [d]; levels: 2 (bit-planes) or 4 (the paper's lattice)."""

    A: Tensor
    b: Tensor
    levels: int

    @property
    def dim(self) -> int:
        """d, weights in a vector."""
        return self.A.shape[0]

    @property
    def bits(self) -> int:
        """m, bits of an index."""
        return self.A.shape[1] * (self.levels.bit_length() - 1)

    @property
    def device(self) -> torch.device:
        """Where A and b are."""
        return self.A.device

    def numbers(self) -> int:
        """How many numbers are learned."""
        return self.A.numel() + self.b.numel()

    def digits(self, index: Tensor) -> Tensor:
        """Index (integers [...]) -> q, fp32 [..., k]."""
        return digits_of(index, self.A.shape[1], self.levels)

    def decode(self, index: Tensor) -> Tensor:
        """Index (integers [...]) -> A q + b, fp32 [..., d]."""
        return self.digits(index) @ self.A.T + self.b

    def searcher(self, metrics: Tensor | None) -> Search:
        """As in Codebook. Exact up to 8 bits; above, a search by halves, 0.2 to 2 % worse for fitted planes."""
        if self.dim == self.A.shape[1] == 1:
            return nearest_level(self.A.item(), self.b.item(), self.levels)
        if self.bits <= EXACT_BITS:
            return super().searcher(metrics)
        from .search_by_halves import nearest_by_halves

        return nearest_by_halves(self.A, self.b, self.levels, metrics)

    def linear_form(self, h: Tensor) -> tuple[Tensor, Self]:
        """As in Codebook: h [M, in] itself, and the codebook as planes."""
        return h, self.as_planes()

    def band(self, vectors: int) -> Tensor:
        """As in Codebook: A of the planes, once for each vector. The offset b is not in it."""
        return torch.block_diag(*[self.as_planes().A.T] * vectors)

    def as_planes(self) -> Self:
        """A digit of four levels is hi + lo / 2, so its column of A becomes two: A and A / 2."""
        if self.levels == 2:
            return self
        columns = torch.stack([self.A, self.A / 2], dim=2)  # hi0 lo0 hi1 lo1 ...: the bits keep their order
        return replace(self, A=columns.flatten(1), levels=2)

    def features(self, index: Tensor) -> Tensor:
        """Index (integers [...]) -> q and a one, fp32 [..., k + 1]."""
        return nn.functional.pad(self.digits(index), (0, 1), value=1.0)

    def with_map(self, wide: Tensor) -> Self:
        """The codebook of these levels with [A | b], any dtype, [d, k + 1]."""
        return replace(self, A=wide[:, :-1].float().contiguous(), b=wide[:, -1].float().contiguous())

    def ahead_of(self, previous: Self, momentum: float) -> Self:
        """A changes slowly and in one direction for many rounds; b does not."""
        return replace(self, A=self.A + momentum * (self.A - previous.A))

    def tensors(self) -> dict[str, Tensor]:
        """What a file stores: A [d, m] and b [d] of the codebook as planes."""
        planes = self.as_planes()
        return {"A": planes.A, "b": planes.b}

    def to(self, device: torch.device | str) -> Self:
        return replace(self, A=self.A.to(device), b=self.b.to(device))


def scalar(step: float = 1.0) -> AffineCodebook:
    """Four uniform levels for one weight: step * {-1.5, -0.5, 0.5, 1.5}."""
    return AffineCodebook(torch.tensor([[step]], dtype=FP32), torch.zeros(1, dtype=FP32), levels=4)


def lattice(dim: int = 4, step: float = 1.0) -> AffineCodebook:
    """The paper's form with A = step * identity: `dim` scalar grids side by side, where tied planes start."""
    return AffineCodebook(step * torch.eye(dim, dtype=FP32), torch.zeros(dim, dtype=FP32), levels=4)


def frame_planes() -> AffineCodebook:
    """Untied planes for d = 4 with one number, their length: A = 0.75 [I | K / sqrt(3)], MSE 0.098 on N(0,1).

    K is a skew conference matrix: zero diagonal, +-1 elsewhere, K K^T = 3 I. So all eight columns are equally long,
    any two meet at a right angle or at a cosine of 1 / sqrt(3), and A A^T is a multiple of I: a tight frame.
    Fits from random starts end 2 to 4 % higher; fits from here stay here.
    """
    K = torch.tensor([[0.0, 1, 1, 1], [-1, 0, 1, -1], [-1, -1, 0, 1], [-1, 1, -1, 0]], dtype=FP32)
    A = 0.75 * torch.cat([torch.eye(4, dtype=FP32), K / 3**0.5], dim=1)
    return AffineCodebook(A, torch.zeros(4, dtype=FP32), levels=2)


def random_planes(dim: int, generator: torch.Generator, bits: int | None = None) -> AffineCodebook:
    """A start for untied planes of `bits` per vector, 2 dim by default.

    Planes of scalar grids, the weights in turn, jittered so that no two columns align.
    """
    bits = 2 * dim if bits is None else bits
    A = torch.eye(dim, dtype=FP32).repeat(1, -(-bits // dim))[:, :bits] / 2.0 ** (torch.arange(bits) // dim)
    jitter = 0.3 * torch.randn(dim, bits, generator=generator, dtype=FP32)
    return AffineCodebook(A + jitter, torch.zeros(dim, dtype=FP32), levels=2)
