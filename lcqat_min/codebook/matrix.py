"""A weight matrix in codes: a codebook, one index per vector of weights, one scale per row.

    W_hat = scale[:, None] * decode(index)        index [out, n / d], scale [out], W_hat [out, n]

Rounding makes one (ptq/ldlq.py), a layer is built from one (layer/linear.py), and a file holds one (packing/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic

from torch import Tensor

from .affine import AffineCodebook
from .table import Codebook, SomeCodebook, TableCodebook


@dataclass(frozen=True)
class CodedMatrix(Generic[SomeCodebook]):
    """codebook; index: int64 [out, n / d], codebook indices; scale: fp32 [out], of the rows."""

    codebook: SomeCodebook
    index: Tensor
    scale: Tensor

    def weight(self) -> Tensor:
        """W_hat, fp32 [out, n]."""
        return self.codebook.decode(self.index).flatten(1) * self.scale[:, None]


def codebook_from(tensors: Mapping[str, Tensor]) -> Codebook:
    """The codebook whose `tensors()` these are, in fp32: A and b of planes, or a table; other tensors are ignored."""
    if "table" in tensors:
        return TableCodebook(tensors["table"].float())
    return AffineCodebook(tensors["A"].float(), tensors["b"].float(), levels=2)
