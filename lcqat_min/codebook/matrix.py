"""What a codebook is, and a weight matrix in codes: a codebook, one index per vector of weights, one scale per row.

    W_hat = scale[:, None] * decode(index)        index [out, n / d], scale [out], W_hat [out, n]

Rounding makes a coded matrix (ptq/ldlq.py), a layer is built from one (layer/linear.py), and a file holds one
(layer/stored.py). To add a kind of codebook, write a subclass of `Codebook` with the methods that are only declared
there, and those that it can do better.
"""

from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from .search import Search, nearest


class Codebook(Protocol):
    """2^m vectors of d weights: `dim` is d, and `bits` is m, the bits of an index."""

    @property
    def dim(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def decode(self, index: Tensor) -> Tensor:
        """Index (integers [...]) -> weights, fp32 [..., d]."""

    def solved(self, x: Tensor, index: Tensor) -> Self:
        """The codebook that fits vectors x [N, d] with these indices [N] best: half a round of codebook/lloyd.py."""

    def tensors(self) -> dict[str, Tensor]:
        """What a file stores."""

    def ahead_of(self, previous: Self, momentum: float) -> Self:
        """The codebook moved on by `momentum` times its change since `previous`; itself where that does not pay."""
        return self

    def linear_form(self, h: Tensor) -> Any:
        """h' and an AffineCodebook of two levels per digit, whose product is that of h [M, in]; None if there is none.

        So D h is the product of h' with the same indices as planes.
        """
        return None

    def band(self, vectors: int) -> Tensor | None:
        """The map from the digits of so many vectors, and of later ones that they depend on, to their weights.

        fp32 [digits, vectors * d], for digits of two levels; None if there is none.
        """
        return None

    def codewords(self) -> Tensor:
        """All 2^m codewords in index order, fp32 [2^m, d]."""
        return self.decode(torch.arange(1 << self.bits, device=self.device))

    def searcher(self, metrics: Tensor | None) -> Search:
        """search(x [d, N], g) -> int64 index [N] of the least |M_g^T (x - w_hat)|^2, for metrics M [G, d, d].

        None: plain distance, g = 0. All that does not depend on x is prepared once.
        """
        return nearest(self.codewords(), metrics)

    def encode(self, x: Tensor) -> Tensor:
        """Nearest codeword: x [N, d] -> int64 index [N]. As exact as `searcher`."""
        return self.searcher(None)(x.T, 0)


class LinearCodebook(Codebook, Protocol):
    """A codebook whose weights are a learned linear map of what the index says: w_g = map @ features_g."""

    def features(self, index: Tensor) -> Tensor:
        """Index (integers [..., n / d]) -> fp32 [..., n / d, k]."""

    def with_map(self, wide: Tensor) -> Self:
        """The codebook of this kind with that map [d, k], any dtype."""

    def solved(self, x: Tensor, index: Tensor) -> Self:
        """The least-squares map for vectors x [N, d] with N indices; fp64 normal equations, k x k."""
        f = self.features(index).flatten(0, -2).double()
        normal = f.T @ f + 1e-6 * torch.eye(f.shape[1]).to(f)  # a digit may be constant here
        return self.with_map(torch.linalg.solve(normal, f.T @ x.double()).T)


B = TypeVar("B", bound=Codebook)
M = TypeVar("M", bound=LinearCodebook)


@dataclass(frozen=True)
class CodedMatrix(Generic[B]):
    """codebook; index: int64 [out, n / d], codebook indices; scale: fp32 [out], of the rows."""

    codebook: B
    index: Tensor
    scale: Tensor

    def weight(self) -> Tensor:
        """W_hat, fp32 [out, n]."""
        return self.codebook.decode(self.index).flatten(1) * self.scale[:, None]
