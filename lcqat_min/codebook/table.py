"""The codebook that the affine ones replace: a table of 2^m vectors, w_hat = T[index].

It is free to be any set of vectors, so no other codebook of its size fits better. Its price: decoding is a lookup, the
index has no digits that could be trained, and it stores 2^m d numbers (k-means, LBG; what AQLM and GPTVQ store).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .search import Search, nearest


@dataclass(frozen=True)
class TableCodebook:
    """w_hat = table[index].  table: fp32 [2^m, d]."""

    table: Tensor

    @property
    def dim(self) -> int:
        """d, weights in a vector."""
        return self.table.shape[1]

    @property
    def bits(self) -> int:
        """m, bits of an index."""
        return int(self.table.shape[0]).bit_length() - 1  # no int in torch.jit.trace

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return self.table.device

    def numbers(self) -> int:
        """How many learned numbers the codebook stores."""
        return self.table.numel()

    def decode(self, index: Tensor) -> Tensor:
        """Index (integers [...]) -> weights, fp32 [..., d]."""
        return self.table[index.long()]

    def codewords(self) -> Tensor:
        """All 2^m codewords, fp32 [2^m, d]."""
        return self.table

    def encode(self, x: Tensor) -> Tensor:
        """Nearest codeword, exact: x [N, d] -> int64 index [N]."""
        return self.searcher(None)(x.T, 0)

    def searcher(self, metrics: Tensor | None) -> Search:
        """As in AffineCodebook.searcher, exact."""
        return nearest(self.table, metrics)

    def as_planes(self) -> None:
        """None: a table has no linear form, which an affine codebook has."""
        return None

    def to(self, device: torch.device | str) -> TableCodebook:
        return TableCodebook(self.table.to(device))
