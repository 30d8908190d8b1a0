"""The packed layer: codes as bytes, side data as 16-bit floats, and never a whole dense weight.

    y = s_out * U_out ( r * D ( U_in (s_in * c * x) ) ) + bias        D = decode(codes) [out, in]

In training the dense weight is decoded, rotated and scaled (layer/linear.py). Here the activations are, which is the
same map; how D is multiplied is the choice of kernels/. The tensors are those of layer/stored.py. Everything is
computed in fp32, whatever the dtype of x. Rounding in another order, it gives what training gave to about six digits.
On GPUs, products of many rows in half precision are the exception.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels.product import product
from ..layer.rotation import rotate, unrotate
from ..layer.stored import DTYPES, codebook_of, indices_of, row_scale_of, signs_of


@dataclass(frozen=True)
class PackedSpec:
    """All that is known of a packed layer except its numbers: what a file's configuration says of it.

    method: its name in systems/. shapes: of its tensors, by name, with those of the codebook. owner: name of the layer
    that stores the codebook: of this one, or of another one. settings: what the method's layer needs to train again.
    """

    method: str
    shapes: dict[str, list[int]]
    bias: bool = False
    owner: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def tensors(self, owner: bool = True) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every tensor that the layer stores: with the codebook if it is the owner of that."""
        stored = {key: shape for key, shape in self.shapes.items() if owner or key in DTYPES}
        return {key: (DTYPES.get(key, torch.float16), tuple(shape)) for key, shape in stored.items()}


class PackedLinear(nn.Module):
    """A linear map stored as `spec` says, for inference: nothing in it is trained.

    owner: the layer that stores the codebook, if that is another one.

    `PackedLinear.compiled = True`, for all or for one: on CPUs, products of few rows go through torch.compile.

    The packed codes have the name `weight`, so that a loader that expects a dense weight stops at its shape instead of
    filling in random numbers.
    """

    compiled = False

    def __init__(self, spec: PackedSpec, owner: Self | None = None):
        super().__init__()
        self.spec, self.owner = spec, (owner or self,)  # a tuple, so no submodule
        self.out_features, self.in_features = spec.shapes["weight"][0], spec.shapes["col_scale"][0]
        for key, (dtype, shape) in spec.tensors(owner is None).items():
            self.register_buffer(key, torch.zeros(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.out_features), requires_grad=False) if spec.bias else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves to a device follow the model; casts leave what is stored as 16-bit floats alone (seen as int16)."""

        def move(t: Tensor) -> Tensor:
            stored = t.is_floating_point() and not isinstance(t, nn.Parameter)
            return fn(t.view(torch.int16)).view(t.dtype) if stored else fn(t)

        return super()._apply(move, recurse)

    def stored(self) -> dict[str, Tensor]:
        """The tensors as a file keeps them, without the bias; those of a shared codebook too."""
        codebook = [key for key in self.spec.shapes if key not in DTYPES]
        shared = {key: getattr(self.owner[0], key).to(self.weight.device) for key in codebook}
        return dict(self.named_buffers()) | shared

    def indices(self) -> Tensor:
        """Codebook index of every vector, int64 [out, vectors]."""
        return indices_of(self.stored())

    def forward(self, x: Tensor) -> Tensor:
        """y = s_out * U_out ( r * D ( U_in (s_in * c * x) ) ) + bias: x [..., in] -> [..., out] in the dtype of x.

        ValueError where x holds integers or does not have `in` features.
        """
        if not x.is_floating_point() or x.shape[-1] != self.in_features:
            got = f"x is {x.dtype} {list(x.shape)}; this layer takes floats [..., {self.in_features}]"
            raise UsageError(f"PackedLinear: {got}. If the model casts to weight.dtype: quantize with it in `skip`")
        stored = self.stored()
        s_in, s_out = signs_of(stored)
        with torch.autocast(x.device.type, enabled=False):
            h = x.reshape(-1, x.shape[-1]).float() * self.col_scale.float()
            h = h if s_in is None else rotate(h, s_in)
            y = product(h, self.weight, codebook_of(stored), x.dtype, self.compiled) * row_scale_of(stored)
            y = y if s_out is None else unrotate(y, s_out)
            y = y if self.bias is None else y + self.bias.float()
            return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
