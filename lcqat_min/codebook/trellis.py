"""The linear trellis: neighbouring vectors share bits, so a whole row of weights is one vector of an affine codebook.

    w_g = sum_{l = 0..reach}  A_l c_{g+l}    c_g in {-1, +1}^m: m new bits for d weights;  A_l [d, m]: taps

Each vector of d weights is a linear function of its own bits *and of those of the next `reach` vectors*. A row of n
weights is w = A c with A [n, n m / d] banded: the formula of the other codebooks with d = n, stored as (reach + 1) d m
numbers. After the last vector there are no bits, and their terms are zero. Without reach the vectors do not touch: that
is untied planes.

    reach   states 2^(m reach)   numbers   MSE on N(0,1), m = 2, d = 1, inner columns
    0               1               2      0.1175     Lloyd and Max's scalar quantizer
    1               4               4      0.0952
    2              16               6      0.0856     untied planes of d = 8 have 136 numbers and 0.092
    3              64               8      0.0810
    4             256              10      0.0787     no code of 2 bits gets below 0.0625

Encoding is a search along the row (ptq/viterbi.py): how well a vector can be met depends on the bits of its neighbours.
Decoding and products are as simple as those of planes: the taps fold into the inputs (`linear_form`).

QTIP (arXiv 2406.11235) rounds with a trellis whose values are a hash of the window or come from a table; here they are
linear in the bits. We have not found that elsewhere.

Limits: one bit per weight gains nothing (0.36 at every reach): w = A c with a square A is a sheared cube, as tied
planes are. There is no table, and no search of one vector by itself. There is no offset b: normal weights do not need
one.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from .affine import AffineCodebook
from .digits import digits_of
from .matrix import LinearCodebook


@dataclass(frozen=True)
class TrellisCodebook(LinearCodebook):
    """w_g = sum_l A_l c_{g+l}.  taps: A_l for l = 0 ... reach, fp32 [reach + 1, d, m]."""

    taps: Tensor

    @property
    def dim(self) -> int:
        """d, weights in a vector."""
        return self.taps.shape[1]

    @property
    def bits(self) -> int:
        """m, new bits of a vector."""
        return self.taps.shape[2]

    @property
    def reach(self) -> int:
        """How many later vectors a vector depends on."""
        return self.taps.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """Where the taps are."""
        return self.taps.device

    def numbers(self) -> int:
        """How many numbers are learned."""
        return self.taps.numel()

    def digits(self, index: Tensor) -> Tensor:
        """Index (integers [...]) -> c, fp32 [..., m]."""
        return digits_of(index, self.bits, 2)

    def decode(self, index: Tensor) -> Tensor:
        """Index of all vectors of a row (integers [..., n / d]) -> weights, fp32 [..., n / d, d]."""
        return filtered(self.digits(index), self.taps)

    def features(self, index: Tensor) -> Tensor:
        """What the weights are linear in, index [..., n / d] -> fp32 [..., n / d, (reach + 1) m]: c_g, c_{g+1}, ..."""
        c, groups = self.digits(index), index.shape[-1]
        return torch.cat(
            [F.pad(c[..., ahead:, :], (0, 0, 0, min(ahead, groups))) for ahead in range(self.reach + 1)], dim=-1
        )

    def with_map(self, wide: Tensor) -> Self:
        """The codebook with the taps [A_0 | A_1 | ...], any dtype, [d, (reach + 1) m]."""
        return replace(self, taps=wide.float().unflatten(1, (-1, self.bits)).transpose(0, 1).contiguous())

    def window_values(self, known: int | None = None) -> Tensor:
        """What the bits of the next vectors add, by state: fp32 [2^(m reach), d].

        The state is their index, nearest vector first, in the highest bits. known: how many of them exist.
        """
        states = digits_of(torch.arange(1 << self.bits * self.reach, device=self.device), self.bits * self.reach, 2)
        states = states.unflatten(1, (self.reach, self.bits))[:, :known]
        return torch.einsum("slm,ldm->sd", states, self.taps[1 : 1 + states.shape[1]])

    def band(self, vectors: int) -> Tensor:
        """As in Codebook: the first rows of the banded A, transposed."""
        return banded(self.taps, vectors)

    def row_end(self, vectors: int) -> Tensor:
        """What the last vectors of a row have more than if the bits behind it were -1: fp32 [<= reach, d]."""
        return self.decode(torch.zeros(min(self.reach, vectors), dtype=torch.long, device=self.device)) + self.taps.sum(
            (0, 2)
        )

    def transposed(self, x: Tensor) -> Tensor:
        """A^T x for the banded A: sum_l A_l^T x_{g-l}, fp32 [..., n / d, d] -> [..., n / d, m]."""
        return filtered(x.flip(-2), self.taps.mT).flip(-2)

    def linear_form(self, h: Tensor) -> tuple[Tensor, AffineCodebook]:
        """h [M, in] -> A^T h [M, n m / d], and planes of one bit: their product is D h, as w . h = c . A^T h."""
        vectors = F.pad(h, (0, -h.shape[1] % self.dim)).unflatten(1, (-1, self.dim))
        return self.transposed(vectors).flatten(1), ONE_BIT.to(h.device)

    def codewords(self) -> Tensor:
        """There are none: what a vector is worth depends on the bits after it. TypeError."""
        raise TypeError("no vector of a trellis stands alone: round whole rows, with lcqat_min.ptq.viterbi_round")

    def tensors(self) -> dict[str, Tensor]:
        """What a file stores: the taps."""
        return {"taps": self.taps}

    def to(self, device: torch.device | str) -> Self:
        return replace(self, taps=self.taps.to(device))


SPAN = 32  # vectors
ONE_BIT = AffineCodebook(torch.ones(1, 1, dtype=torch.float32), torch.zeros(1, dtype=torch.float32), levels=2)


def filtered(c: Tensor, taps: Tensor) -> Tensor:
    """sum_l taps_l c_{g+l}: c fp32 [..., G, m], taps [reach + 1, d, m] -> [..., G, d], with gradient to both.

    The vectors are taken SPAN at a time, as a product with a part of the banded matrix: taps by themselves are too
    small for a fast product.
    """
    (_, d, m), reach, groups = taps.shape, len(taps) - 1, c.shape[-2]
    span = max(SPAN, reach)
    x = F.pad(c, (0, 0, 0, -groups % span)).flatten(-2).unflatten(-1, (-1, span * m))
    band = banded(taps, span)
    w = x @ band[: span * m]
    if reach:  # the last vectors of a span also depend on the first of the next
        next_span = x[..., 1:, : reach * m] @ band[span * m :, (span - reach) * d :]
        w = w + F.pad(next_span, ((span - reach) * d, 0, 0, 1))
    return w.flatten(-2).unflatten(-1, (-1, d))[..., :groups, :]


def banded(taps: Tensor, count: int) -> Tensor:
    """The map from the digits of count + reach vectors to the weights of `count`, [(count + reach) m, count d]."""
    eye = torch.eye(count + len(taps) - 1, dtype=taps.dtype, device=taps.device)
    shifts = torch.stack([eye[:, ahead : ahead + count] for ahead in range(len(taps))])
    return torch.einsum("lcg,ldm->cmgd", shifts, taps).flatten(2).flatten(0, 1)
