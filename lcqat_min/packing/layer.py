"""The packed layer: codes as bytes, side data as 16-bit floats, and never a whole dense weight.

    weight      uint8 [out, bytes]   codes: each row is one big-endian bit string of m-bit indices, padded
                                     with zeros to a whole byte
    A, b        fp16 [d, k], [d]     or table fp16 [2^m, d], which layers may share
    row_scale   fp16 [out]           r, times 2^exponent
    col_scale   fp16 [in]            c
    signs_in    uint8 [in / 8]       s_in and s_out: one bit each, 1 for +1, packed as the codes are; only on
    signs_out   uint8 [out / 8]      sides that are rotated

So at 2 bits a byte holds four weights, whether d is 1, 2 or 4, the first in the highest bits; with d = 8 a
vector is two bytes. That a row starts on a byte costs it at most 7 bits.

In training the dense weight is decoded, rotated and scaled (layer/linear.py). Here the activations are, which is
the same map, with D = decode(codes) [out, in] never whole on a CPU (kernels/decode.py, kernels/triton_kernels.py):

    y = s_out * H_out ( r * D ( H_in (s_in * c * x) ) ) + bias

Everything is computed in fp32, whatever the dtype of x. Rounding in another order, it gives what training
gave to about six digits. On GPUs, products of many rows in half precision are the exception
(kernels/triton_kernels.py).

`pack_bits` and `unpack_bits` are plain torch, to be read, and to check the products against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..cached_tensors import made_once
from ..codebook.affine import AffineCodebook, scalar
from ..codebook.lloyd import Codebook
from ..codebook.table import TableCodebook
from ..kernels.triton_kernels import packed_linear

ROWS = 128  # rows packed at a time: the bits of a whole matrix would take 8 bytes each


def pack_bits(index: Tensor, bits: int) -> Tensor:
    """Integers below 2^bits, [rows, count] -> uint8 [rows, ceil(count * bits / 8)], big-endian."""
    if bits == 8:
        return index.to(torch.uint8)
    shifts = torch.arange(bits - 1, -1, -1, device=index.device)
    places = 2 ** torch.arange(7, -1, -1, device=index.device)
    parts = []
    for part in index.split(ROWS):
        string = ((part.unsqueeze(-1) >> shifts) & 1).flatten(1)
        octets = F.pad(string, (0, -string.shape[1] % 8)).unflatten(1, (-1, 8))
        parts.append((octets * places).sum(-1).to(torch.uint8))
    return torch.cat(parts)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of pack_bits: uint8 [rows, bytes] -> int64 [rows, count]. bits: at most 16."""
    if bits == 8:
        return packed.long()
    begin = torch.arange(count, device=packed.device) * bits
    first, offset = begin // 8, begin % 8
    wide = F.pad(packed, (0, 2)).long()  # an index lies within three bytes
    three = wide[:, first] << 16 | wide[:, first + 1] << 8 | wide[:, first + 2]
    return three >> (24 - bits - offset) & ((1 << bits) - 1)


@made_once
def _byte_signs(device: torch.device) -> Tensor:
    """The eight signs in every byte, fp32 [256, 8]: -1 for 0, +1 for 1."""
    return (2 * unpack_bits(torch.arange(256, dtype=torch.uint8, device=device)[:, None], 1, 8) - 1).float()


@dataclass(frozen=True)
class PackedSpec:
    """All that is known of a packed layer but its numbers: what a file's configuration says of it.

    kind: affine | step | table. dim: d. bits: m. levels: of a digit, 0 for a table. exponent: of the row
    scales. owner: name of the layer that stores the table. estimator, learn_codebook: for further training.
    """

    kind: str
    inputs: int
    outputs: int
    dim: int
    bits: int
    levels: int
    rotate_in: bool
    rotate_out: bool
    bias: bool
    exponent: int = 0
    owner: str = ""
    estimator: str = "ste"
    learn_codebook: bool = True

    @property
    def vectors(self) -> int:
        """Vectors in a row; the last one may reach beyond the inputs."""
        return -(-self.inputs // self.dim)

    @property
    def digits(self) -> int:
        """k, digits in an index; 0 for a table."""
        return self.bits // (self.levels.bit_length() - 1) if self.levels else 0

    def tensors(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every packed tensor that the layer `name` stores itself."""
        half = torch.float16
        layout = {
            "weight": (torch.uint8, (self.outputs, -(-self.vectors * self.bits // 8))),
            "row_scale": (half, (self.outputs,)),
            "col_scale": (half, (self.inputs,)),
        }
        if self.kind == "affine":
            layout |= {"A": (half, (self.dim, self.digits)), "b": (half, (self.dim,))}
        if self.kind == "table" and self.owner == name:
            layout["table"] = half, (1 << self.bits, self.dim)
        if self.rotate_in:
            layout["signs_in"] = torch.uint8, (-(-self.inputs // 8),)
        if self.rotate_out:
            layout["signs_out"] = torch.uint8, (-(-self.outputs // 8),)
        return layout


class PackedLinear(nn.Module):
    """A linear map stored as `spec.tensors(name)`, for inference: nothing in it is trained.

    `PackedLinear.compiled = True`, for all or for one: on CPUs, products of few rows go through torch.compile.

    The codes go by the name `weight`, so that a loader that expects a dense weight stops at its shape instead
    of filling in random numbers. `share_tables` completes layers with tables, all of a model together.
    """

    compiled = False

    def __init__(self, spec: PackedSpec, name: str = ""):
        super().__init__()
        self.spec, self.in_features, self.out_features = spec, spec.inputs, spec.outputs
        for key, (dtype, shape) in spec.tensors(name).items():
            self.register_buffer(key, torch.zeros(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(spec.outputs), requires_grad=False) if spec.bias else None
        self.owner: tuple[PackedLinear, ...] = ()  # who stores the table; a tuple, so no submodule

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Moves to a device follow the model; casts leave what is stored as fp16 alone (seen as int16)."""
        return super()._apply(
            lambda t: (
                fn(t)
                if isinstance(t, nn.Parameter) or not t.is_floating_point()
                else fn(t.view(torch.int16)).view(t.dtype)
            ),
            recurse,
        )

    def codebook(self) -> Codebook:
        """The codebook in fp32."""
        device = self.weight.device
        if self.spec.kind == "step":
            return scalar().to(device)
        if self.spec.kind == "table":
            return TableCodebook(self.owner[0].table.float().to(device))
        return AffineCodebook(self.A.float(), self.b.float(), self.spec.levels)

    def codes(self) -> Tensor:
        """Codebook index of every vector, int64 [out, vectors]."""
        return unpack_bits(self.weight, self.spec.bits, self.spec.vectors)

    def scale(self) -> Tensor:
        """Row scales r, fp32 [out]."""
        return self.row_scale.float() * 2.0**self.spec.exponent

    def signs(self, side: str) -> Tensor | None:
        """-1 and +1, fp32 [in] or [out], for side "in" or "out"; None where it is not rotated."""
        packed = getattr(self, f"signs_{side}", None)
        width = self.spec.inputs if side == "in" else self.spec.outputs
        return None if packed is None else F.embedding(packed.int(), _byte_signs(packed.device)).flatten()[:width]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x; kernels/triton_kernels.py chooses how by the device of x."""
        return packed_linear(
            x,
            self.weight,
            self.codebook(),
            self.scale(),
            self.bias,
            self.col_scale.float(),
            self.signs("in"),
            self.signs("out"),
            self.compiled,
        )

    def extra_repr(self) -> str:
        spec = self.spec
        return f"in={spec.inputs}, out={spec.outputs}, {spec.kind}, d={spec.dim}, {spec.bits} bits a vector"


def share_tables(layers: dict[str, PackedLinear]) -> None:
    """Point every table layer at the one that stores its table. layers: all of a model, by name."""
    for layer in layers.values():
        if layer.spec.kind == "table":
            layer.owner = (layers[layer.spec.owner],)
