"""A free table: the vector quantizer with the fewest constraints, and what it costs. k-means as in AQLM and GPTVQ.

    w_hat = T[index]        T [2^m, d], fp16; one table for the whole model

No codebook of its size fits the weights better. But an index has no digits, so training cannot move it: the codes stay
as rounding left them, and the table, the scales and the rest of the model learn.

Limits: one table per model, since a table per matrix costs 0.1 to 0.3 bits per weight on a small one; m up to 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..codebook.lloyd import fit
from ..codebook.matrix import CodedMatrix
from ..codebook.table import TableCodebook, table_start
from ..errors import UsageError
from ..layer.linear import QuantLinear, Signs, in_units, root_mean_square
from ..ptq.method import FIT_VECTORS, Method, pad, rotated, sample_vectors
from ..ptq.model import weight_of


class TableLinear(QuantLinear):
    """Fixed indices and a learned table, which layers share by holding the same parameter."""

    method = "free-vq"
    learned = ("table",)

    def __init__(
        self,
        coded: CodedMatrix[TableCodebook],
        in_features: int,
        bias: Tensor | None,
        signs: Signs,
        table: nn.Parameter | None = None,
        learn_codebook: bool = True,
    ):
        super().__init__(coded, in_features, bias, signs)
        self.table = nn.Parameter(coded.codebook.table, requires_grad=learn_codebook) if table is None else table
        self.register_buffer("index", coded.index.to(torch.int32))

    def decoded(self) -> Tensor:
        return F.embedding(self.index, self.table.to(self.index.device)).flatten(1)

    def indices(self) -> Tensor:
        return self.index.long()

    def codebook(self) -> TableCodebook:
        return TableCodebook(self.table.detach().to(self.index.device))

    def settings(self) -> dict[str, object]:
        return {"learn_codebook": self.table.requires_grad}

    def units(self) -> dict[str, tuple[str, float]]:
        return super().units() | {"table": ("codebooks", root_mean_square(self.table))}


@dataclass(frozen=True, kw_only=True)
class FreeVQ(Method):
    """bits: per weight. dim: d, weights per vector. bits * dim is m, the bits of an index: whole, 1 to 8.

    learn_codebook: train the table. table: the model's, made by `start`.
    """

    bits: float = 2.0
    dim: int = 4
    learn_codebook: bool = True
    table: nn.Parameter | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        m = self.bits * self.dim
        if self.dim < 1 or not (m == int(m) and 1 <= m <= 8):
            got = f"FreeVQ.dim is {self.dim} and bits {self.bits}"
            raise UsageError(f"{got}; their product, the bits of an index, must be 1, 2, ... 8")
        if self.table is not None and len(self.table) != 2**m:
            raise UsageError(f"FreeVQ has one table for the model, of {len(self.table)} vectors: bits cannot differ")

    def start(self, layers: Sequence[nn.Module], generator: torch.Generator) -> Self:
        """With one k-means table for `layers`, fitted to a sample of their weights, rotated as `layer` will do it."""
        twin = torch.Generator()
        twin.set_state(generator.get_state())  # draws the same signs, and leaves `generator` as it is
        share = max(1, 4 * FIT_VECTORS // len(layers))
        samples = []
        for layer in layers:
            W = weight_of(layer)
            W = pad(rotated(in_units(W)[0], self.signs(W, twin)), self.dim)
            samples.append(sample_vectors(W, self.dim, share).cpu())
        book = fit(
            torch.cat(samples), normal_table(self.dim, round(self.bits * self.dim), generator.initial_seed()), rounds=10
        )
        return replace(self, table=nn.Parameter(book.table.to(W.device), requires_grad=self.learn_codebook))

    def layer(self, W: Tensor, H: Tensor, bias: Tensor | None, generator: torch.Generator) -> TableLinear:
        """As in Method, with the table that `start` has made."""
        assert self.table is not None  # quantize calls start before
        signs, book = self.signs(W, generator), TableCodebook(self.table.detach().to(W.device))
        rounded = self.round(*self.prepare(W, H, signs, self.dim), book)
        return TableLinear(rounded.coded, W.shape[1], bias, signs, self.table)


@lru_cache(maxsize=4)
def normal_table(dim: int, bits: int, seed: int) -> TableCodebook:
    """The table fitted to N(0, 1) weights, where the fit to a model starts; made once (it takes seconds)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30_000, dim, generator=generator, dtype=torch.float32)
    return fit(x, table_start(x, 2**bits, generator), rounds=20)
