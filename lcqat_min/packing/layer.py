"""The packed layer: codes as bytes, side data as 16-bit floats, and never a whole dense weight.

    y = s_out * U_out ( r * D ( U_in (s_in * c * x) ) ) + bias        D = decode(codes) [out, in]

In training the dense weight is decoded, rotated and scaled (layer/linear.py). Here the activations are, which is the
same map; how D is multiplied is the choice of kernels/. The tensors are those of layer/stored.py. Everything is
computed in fp32, whatever the dtype of x. Rounding in another order, it gives what training gave to about six digits.
On GPUs, products of many rows in half precision are the exception.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..codebook.bitstring import unpack_bits
from ..codebook.matrix import Codebook
from ..errors import UsageError
from ..kernels.product import product
from ..layer.rotation import rotate, unrotate
from ..layer.stored import codebook_from, row_scale_of, unpack_signs


@dataclass(frozen=True)
class PackedSpec:
    """All that is known of a packed layer except its numbers: what a file's configuration says of it.

    method: its name in systems/. inputs, outputs: of the linear map. dim: d. bits: m, of an index. codebook: shapes of
    its tensors by name. owner: name of the layer that stores them, if several layers share them. settings: what the
    method's layer needs to train again.
    """

    method: str
    inputs: int
    outputs: int
    dim: int
    bits: int
    codebook: dict[str, list[int]]
    rotate_in: bool
    rotate_out: bool
    bias: bool
    owner: str = ""
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def vectors(self) -> int:
        """Vectors in a row; the last one may reach beyond the inputs."""
        return -(-self.inputs // self.dim)

    def tensors(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every packed tensor that the layer `name` stores itself."""
        half = torch.float16
        layout = {
            "weight": (torch.uint8, (self.outputs, -(-self.vectors * self.bits // 8))),
            "row_scale": (half, (self.outputs,)),
            "unit": (torch.bfloat16, (1,)),
            "col_scale": (half, (self.inputs,)),
        }
        if self.owner in ("", name):
            layout |= {key: (half, tuple(shape)) for key, shape in self.codebook.items()}
        widths = {"signs_in": self.inputs * self.rotate_in, "signs_out": self.outputs * self.rotate_out}
        return layout | {key: (torch.uint8, (-(-width // 8),)) for key, width in widths.items() if width}


class PackedLinear(nn.Module):
    """A linear map stored as `spec.tensors(name)`, for inference: nothing in it is trained.

    `PackedLinear.compiled = True`, for all or for one: on CPUs, products of few rows go through torch.compile.

    The packed codes have the name `weight`, so that a loader that expects a dense weight stops at its shape instead of
    filling in random numbers. `share_codebooks` completes layers that share theirs, all of a model together.
    """

    compiled = False
    has_indices = True

    def __init__(self, spec: PackedSpec, name: str = ""):
        super().__init__()
        self.spec, self.in_features, self.out_features = spec, spec.inputs, spec.outputs
        for key, (dtype, shape) in spec.tensors(name).items():
            self.register_buffer(key, torch.zeros(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(spec.outputs), requires_grad=False) if spec.bias else None
        self.owner: tuple[PackedLinear, ...] = (self,)  # who stores the codebook; a tuple, so no submodule

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Moves to a device follow the model; casts leave what is stored as 16-bit floats alone (seen as int16)."""

        def move(t: Tensor) -> Tensor:
            stored_as_float = t.is_floating_point() and not isinstance(t, nn.Parameter)
            return fn(t.view(torch.int16)).view(t.dtype) if stored_as_float else fn(t)

        return super()._apply(move, recurse)

    def stored(self) -> dict[str, Tensor]:
        """The tensors as a file keeps them, without the bias; those of a shared codebook too."""
        book = {key: getattr(self.owner[0], key).to(self.weight.device) for key in self.spec.codebook}
        return dict(self.named_buffers()) | book

    def codebook(self) -> Codebook:
        """The codebook in fp32."""
        return codebook_from(self.stored())

    def indices(self) -> Tensor:
        """Codebook index of every vector, int64 [out, vectors]."""
        return unpack_bits(self.weight, self.spec.bits, self.spec.vectors)

    def scale(self) -> Tensor:
        """Row scales r, fp32 [out]."""
        return row_scale_of({"row_scale": self.row_scale, "unit": self.unit})

    def signs(self, side: str) -> Tensor | None:
        """-1 and +1, fp32 [in] or [out], for side "in" or "out"; None where it is not rotated."""
        packed = getattr(self, f"signs_{side}", None)
        width = self.in_features if side == "in" else self.out_features
        return None if packed is None else unpack_signs(packed, width)

    def forward(self, x: Tensor) -> Tensor:
        """y = s_out * U_out ( r * D ( U_in (s_in * c * x) ) ) + bias: x [..., in] -> [..., out] in the dtype of x.

        TypeError where x holds integers, ValueError where it does not have `in` features.
        """
        self._check(x)
        s_in, s_out = self.signs("in"), self.signs("out")
        with torch.autocast(x.device.type, enabled=False):
            h = x.reshape(-1, x.shape[-1]).float() * self.col_scale.float()
            h = h if s_in is None else rotate(h, s_in)
            y = product(h, self.weight, self.codebook(), x.dtype, self.compiled) * self.scale()
            y = y if s_out is None else unrotate(y, s_out)
            y = y if self.bias is None else y + self.bias.float()
            return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            why = "The model casts to weight.dtype, but the weight of a packed layer is its packed codes"
            raise TypeError(f"PackedLinear: x is {x.dtype}. {why}: quantize again, with this layer in `skip`.")
        if x.shape[-1] != self.in_features:
            raise UsageError(f"PackedLinear: x has {x.shape[-1]} features; this layer takes {self.in_features}.")

    def extra_repr(self) -> str:
        spec = self.spec
        return f"in={spec.inputs}, out={spec.outputs}, {spec.method}, d={spec.dim}, {spec.bits} bits per vector"


def share_codebooks(layers: dict[str, PackedLinear]) -> None:
    """Point every layer at the one that stores its codebook. layers: all of a model, by name."""
    for layer in layers.values():
        if layer.spec.owner:
            layer.owner = (layers[layer.spec.owner],)
