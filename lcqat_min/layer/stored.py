"""What a file keeps of a layer: indices as bytes, signs as bits, scales and codebook as 16-bit floats.

    weight       uint8 [out, bytes]   packed codes: each row is one big-endian bit string of m-bit indices, padded with
                                      zeros to a whole byte
    row_scale    fp16 [out]           r / unit
    unit         bf16 [1]             a power of two: 1, except where r leaves the range of fp16
    col_scale    fp16 [in]            c
    A, b         fp16 [d, m], [d]     the codebook as planes; or table, fp16 [2^m, d]
    signs_in     uint8 [in / 8]       s_in and s_out: one bit each, 1 for +1, packed as indices are; only on sides that
    signs_out    uint8 [out / 8]      are rotated

At 2 bits a byte holds four weights, whether d is 1, 2 or 4; with d = 8 a vector takes two bytes.

Why fp16: bf16 would change the outputs more (8 bits where fp16 has 11), and fp32 would cost 0.1 bits per weight more at
width 256. What fp16 lacks is range: it loses digits below 6e-5 and ends at 65504. Row scales that leave this range are
multiplied by a power of two, which is exact.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..codebook.affine import AffineCodebook
from ..codebook.bitstring import pack_bits, unpack_bits
from ..codebook.matrix import Codebook, CodedMatrix
from ..codebook.table import TableCodebook
from .linear import QuantLinear

FP16_NORMAL = 2.0**-14, 65504.0  # the range in which fp16 has all of its 11 bits
SMALLEST = 2.0**-24  # above zero, in fp16


def tensors_of(layer: QuantLinear) -> dict[str, Tensor]:
    """The tensors of `layer` as a file keeps them, without the bias. ValueError for a number that fp16 cannot hold."""
    book = layer.codebook()
    tensors = {"weight": pack_bits(layer.indices(), book.bits)}
    tensors |= halves_of(layer.row_scale, {"col_scale": layer.col_scale, **book.tensors()})
    signs = {"signs_in": layer.signs_in, "signs_out": layer.signs_out}
    return tensors | {key: pack_signs(value) for key, value in signs.items() if value is not None}


def layer_from(
    kind: type[QuantLinear], stored: Mapping[str, Tensor], inputs: int, bias: Tensor | None, settings: dict
) -> QuantLinear:
    """The layer of these tensors, in training again: it starts on its codes. settings: what its `settings` gave."""
    others = {key: value for key, value in settings.items() if key != "levels"}
    book = codebook_from(stored, settings.get("levels", 2))
    index = unpack_bits(stored["weight"], book.bits, -(-inputs // book.dim))
    s_in = unpack_signs(stored["signs_in"], inputs) if "signs_in" in stored else None
    s_out = unpack_signs(stored["signs_out"], len(index)) if "signs_out" in stored else None
    layer = kind(CodedMatrix(book, index, row_scale_of(stored)), inputs, bias, (s_in, s_out), **others)
    layer.col_scale.data.copy_(stored["col_scale"])
    return layer


@torch.no_grad()
def round_to_storage(layer: QuantLinear) -> None:
    """Round scales and codebook in place to the numbers that a file keeps. The codes stay the same."""
    numbers = {name: getattr(layer, name) for name in ("col_scale", *layer.learned)}
    halves = halves_of(layer.row_scale, numbers)
    layer.set_row_scale(row_scale_of(halves))
    for name, value in numbers.items():
        value.copy_(halves[name])


def halves_of(row_scale: Tensor, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """row_scale, its unit and `numbers` as a file keeps them. ValueError for a number that fp16 cannot hold."""
    unit = _unit(row_scale.detach().abs())
    scaled = {"row_scale": row_scale / unit, **numbers}
    halves = {key: value.detach().half() for key, value in scaled.items()}
    halves["row_scale"][halves["row_scale"] == 0] = SMALLEST  # a row of zeros; a learned step divides by it
    for key, half in halves.items():
        if not torch.isfinite(half).all():
            largest = scaled[key].abs().max().item()
            raise ValueError(f"{key} reaches {largest:.3g}, and fp16 ends at 65504: train at a lower rate")
    return halves | {"unit": torch.tensor([unit], dtype=torch.bfloat16, device=row_scale.device)}


def _unit(scales: Tensor) -> float:
    largest = scales.max().item()
    smallest = torch.where(scales > 0, scales, largest).min().item()
    fits = FP16_NORMAL[0] <= smallest and largest <= FP16_NORMAL[1]
    if fits or not 0 < largest < math.inf:
        return 1.0
    exponent = math.frexp(largest * (1 + 2**-11))[1]  # the factor: the largest may be rounded up
    return 2.0 ** max(exponent - 15, -126)  # in this unit the largest is 2^14 ... 2^15


def row_scale_of(stored: Mapping[str, Tensor]) -> Tensor:
    """r, fp32 [out]."""
    return stored["row_scale"].float() * stored["unit"].float()


def pack_signs(signs: Tensor) -> Tensor:
    """-1 and +1 [n] -> uint8 [n / 8]."""
    return pack_bits((signs > 0).long()[None], 1)[0]


def unpack_signs(packed: Tensor, width: int) -> Tensor:
    """Inverse of pack_signs: fp32 [width]."""
    return 2.0 * unpack_bits(packed[None], 1, width)[0].float() - 1


def codebook_from(stored: Mapping[str, Tensor], levels: int = 2) -> Codebook:
    """The codebook of a stored layer, in fp32: a table, or planes, in digits of 2 or 4 levels."""
    if "table" in stored:
        return TableCodebook(stored["table"].float())
    A, b = stored["A"].float(), stored["b"].float()
    return AffineCodebook(A, b, 2) if levels == 2 else AffineCodebook(A[:, ::2].contiguous(), b, 4)
