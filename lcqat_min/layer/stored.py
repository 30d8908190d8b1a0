"""What a file keeps of a layer: indices as bytes, signs as bits, scales and codebook as 16-bit floats.

    weight       uint8 [out, bytes]   packed codes: each row is one big-endian bit string of m-bit indices, padded with
                                      zeros to a whole byte
    row_scale    fp16 [out]           r / unit
    unit         bf16 [1]             a power of two, such that the largest of row_scale is from 2^14 to 2^15
    col_scale    fp16 [in]            c
    A, b         fp16 [d, m], [d]     the codebook as planes; or table, fp16 [2^m, d]; or taps, fp16 [reach + 1, d, m]
    signs_in     uint8 [in / 8]       s_in and s_out: one bit each, 1 for +1, packed as indices are; only on sides that
    signs_out    uint8 [out / 8]      are rotated

At 2 bits a byte holds four weights, whether d is 1, 2 or 4; with d = 8 a vector takes two bytes.

Why fp16: bf16 would change the outputs more (8 bits where fp16 has 11), and fp32 would cost 0.1 bits per weight more at
width 256. What fp16 lacks is range: it loses digits below 6e-5 and ends at 65504. So row scales are multiplied by a
power of two, which is exact.
"""

import math

import torch
from torch import Tensor

from ..codebook.affine import AffineCodebook
from ..codebook.bitstring import pack_bits, unpack_bits
from ..codebook.matrix import Codebook, CodedMatrix
from ..codebook.table import TableCodebook
from ..codebook.trellis import TrellisCodebook
from ..errors import UsageError
from .linear import QuantLinear, Signs

DTYPES = {"weight": torch.uint8, "signs_in": torch.uint8, "signs_out": torch.uint8, "unit": torch.bfloat16}
DTYPES |= {"row_scale": torch.float16, "col_scale": torch.float16}  # all others are of the codebook, and fp16
Stored = dict[str, Tensor]


@torch.no_grad()
def tensors_of(layer: QuantLinear, name: str = "") -> Stored:
    """The tensors of `layer` as a file keeps them, without the bias. UsageError for a number that fp16 cannot hold."""
    book, signs = layer.codebook(), {"signs_in": layer.signs_in, "signs_out": layer.signs_out}
    tensors = {"weight": pack_bits(layer.indices(), book.bits), "unit": _unit(layer.row_scale)}
    tensors |= {key: pack_bits((s > 0).long()[None], 1)[0] for key, s in signs.items() if s is not None}
    numbers = {"row_scale": layer.row_scale / tensors["unit"].float(), "col_scale": layer.col_scale, **book.tensors()}
    halves = {key: value.half() for key, value in numbers.items()}
    for key, half in halves.items():
        if not half.isfinite().all():
            size = f"{numbers[key].abs().max():.3g}, and fp16 ends at 65504"
            raise UsageError(f"layer {name!r}: {key} reaches {size}: train at a lower rate")
    halves["row_scale"][halves["row_scale"] == 0] = 2.0**-24  # the least above 0; a learned step divides by it
    return tensors | halves


def _unit(row_scale: Tensor) -> Tensor:
    largest = row_scale.abs().max().item() * (1 + 2**-11)  # it may be rounded up
    exponent = math.frexp(largest)[1] - 15 if 0 < largest < math.inf else 0
    return torch.tensor([2.0 ** max(exponent, -100)], dtype=torch.bfloat16, device=row_scale.device)


def layer_from(cls: type[QuantLinear], stored: Stored, bias: Tensor | None, levels: int = 2, **settings) -> QuantLinear:
    """The layer of these tensors, in training again: it starts on its codes. settings: what its `settings` gave."""
    coded = CodedMatrix(codebook_of(stored, levels), indices_of(stored), row_scale_of(stored))
    layer = cls(coded, len(stored["col_scale"]), bias, signs_of(stored), **settings)
    layer.col_scale.data.copy_(stored["col_scale"])
    return layer


def row_scale_of(stored: Stored) -> Tensor:
    """r, fp32 [out]."""
    return stored["row_scale"].float() * stored["unit"].float()


def signs_of(stored: Stored) -> Signs:
    """s_in and s_out, fp32 [in] and [out]; None for a side that is not rotated."""

    def unpack(key: str, width: int) -> Tensor | None:
        return (2 * unpack_bits(stored[key][None], 1, width)[0] - 1).float() if key in stored else None

    return unpack("signs_in", len(stored["col_scale"])), unpack("signs_out", len(stored["weight"]))


def codebook_of(stored: Stored, levels: int = 2) -> Codebook:
    """The codebook in fp32: a table, or planes, in digits of 2 or 4 levels."""
    if "table" in stored:
        return TableCodebook(stored["table"].float())
    if "taps" in stored:
        return TrellisCodebook(stored["taps"].float())
    A, b = stored["A"].float(), stored["b"].float()
    return AffineCodebook(A, b, 2) if levels == 2 else AffineCodebook(A[:, ::2].contiguous(), b, 4)


def indices_of(stored: Stored) -> Tensor:
    """The codebook index of every vector, int64 [out, vectors]."""
    book = codebook_of(stored)
    return unpack_bits(stored["weight"], book.bits, -(-len(stored["col_scale"]) // book.dim))
