"""A weight matrix in codes: a codebook, an index for each vector of weights, a scale for each row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .lloyd import Codebook


@dataclass(frozen=True)
class Rounded:
    """A quantized matrix: W_hat = scale[:, None] * codebook.decode(index).

    index: int64 [out, n / d]; scale: fp32 [out]; target: fp32 [out, n], what each vector was rounded from, in
    units of the scale (the weight plus carried error: where latents start); loss: fp64 [out], the proxy loss
    of each row under the damped H.
    """

    codebook: Codebook
    index: Tensor
    scale: Tensor
    target: Tensor
    loss: Tensor

    def weight(self) -> Tensor:
        """W_hat, fp32 [out, n]."""
        return self.codebook.decode(self.index).flatten(1) * self.scale[:, None]
