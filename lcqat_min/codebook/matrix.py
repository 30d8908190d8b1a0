"""A weight matrix in codes: a codebook, one index per vector of weights, one scale per row.

    W_hat = scale[:, None] * decode(index)        index [out, n / d], scale [out], W_hat [out, n]

Rounding makes one (ptq/ldlq.py), a layer is built from one (layer/linear.py), and a file holds one (layer/stored.py).
`Codebook` is what all of them ask of a codebook: to add a kind, write a class with these methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .affine import AffineCodebook


class Codebook(Protocol):
    """dim: d, weights in a vector. bits: m, of an index. The rest is described at AffineCodebook."""

    @property
    def dim(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def decode(self, index: Tensor) -> Tensor: ...
    def codewords(self) -> Tensor: ...
    def encode(self, x: Tensor) -> Tensor: ...
    def searcher(self, metrics: Tensor | None) -> Callable[[Tensor, int], Tensor]: ...
    def as_planes(self) -> AffineCodebook | None: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def solved(self, x: Tensor, index: Tensor) -> Self: ...
    def ahead_of(self, previous: Self, momentum: float) -> Self: ...


B = TypeVar("B", bound=Codebook)


@dataclass(frozen=True)
class CodedMatrix(Generic[B]):
    """codebook; index: int64 [out, n / d], codebook indices; scale: fp32 [out], of the rows."""

    codebook: B
    index: Tensor
    scale: Tensor

    def weight(self) -> Tensor:
        """W_hat, fp32 [out, n]."""
        return self.codebook.decode(self.index).flatten(1) * self.scale[:, None]
