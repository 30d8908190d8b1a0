"""The codebook that the affine ones replace: a table of 2^m vectors, w_hat = T[index].

It is free to be any set of vectors, so no other codebook of its size fits better. Its price: decoding is a lookup, the
index has no digits that could be trained, and it stores 2^m d numbers (k-means, LBG; what AQLM and GPTVQ store).
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from .matrix import Codebook


@dataclass(frozen=True)
class TableCodebook(Codebook):
    """w_hat = table[index].  table: fp32 [2^m, d]. The search is exact; there is no linear form."""

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
        """How many numbers are learned."""
        return self.table.numel()

    def decode(self, index: Tensor) -> Tensor:
        """Index (integers [...]) -> weights, fp32 [..., d]."""
        return self.table[index.long()]

    def solved(self, x: Tensor, index: Tensor) -> "TableCodebook":
        """The mean of each cell of the vectors x [N, d]; empty cells move to the vectors with the largest errors."""
        count = torch.bincount(index, minlength=len(self.table))[:, None]
        total = torch.zeros_like(self.table).index_add_(0, index, x)
        table = torch.where(count > 0, total / count.clamp(min=1), self.table)
        empty = (count[:, 0] == 0).nonzero().flatten()[: len(x)]
        table[empty] = x[(x - self.decode(index)).square().sum(1).topk(len(empty)).indices]
        return TableCodebook(table)

    def tensors(self) -> dict[str, Tensor]:
        """What a file stores: the table."""
        return {"table": self.table}

    def to(self, device: torch.device | str) -> Self:
        return replace(self, table=self.table.to(device))


def table_start(x: Tensor, size: int, generator: torch.Generator) -> TableCodebook:
    """k-means start: `size` of the vectors x [N, d], drawn without repetition. ValueError where N < size."""
    if len(x) < size:
        raise ValueError(f"table_start: {len(x)} vectors for a table of {size}. Give more or lower `size`.")
    return TableCodebook(x[torch.randperm(len(x), generator=generator)[:size].to(x.device)].clone())
