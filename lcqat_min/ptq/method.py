"""Method: what `quantize` asks of a way to quantize, and the steps that ways share.

    method = method.start(layers, generator)             once per model; most methods have nothing to do here
    layer = method.layer(W, H, bias, generator)          once per linear layer -> a QuantLinear

To add a system, write a subclass: settings are fields, `layer` makes the layer, and systems/table.py gives it a
name. CONTRIBUTING.md has a complete example. A method may use as much of the rest as it likes:

    signs      random signs of the rotation
    prepare    W and H rotated and padded to whole vectors; H damped and factored
    round      codes for the prepared W, by ptq/ldlq.py:
               round 0   at the best of a few scales per row, SCALE_FACTORS times its root mean square
               refits    (A, b) by least squares on the layer's outputs, and codes again at NEARBY times those scales
               sweeps    each vector again, with all others fixed (ptq/sweeps.py)

A refit counts only where it lowers the proxy loss of the whole matrix; the first that does not is the last.

Limits: each matrix is rounded by itself, from the second moments of the unquantized model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from ..codebook.matrix import Codebook
from ..errors import UsageError
from ..layer.linear import QuantLinear, Signs
from ..layer.rotation import random_signs, rotate
from .ldlq import Rounded, refit, round_matrix, row_scales
from .moments import Factor, factorize
from .sweeps import swept

ROTATIONS = ("none", "input", "both")
NEARBY = (0.95, 1.0, 1.05)
FIT_VECTORS = 1 << 14  # weight vectors of a matrix that its codebook is fitted to


@dataclass(frozen=True, kw_only=True)
class Method:
    """rotate     none | input | both: where the block-Hadamard rotation acts
    feedback   carry rounding errors to the next columns (LDLQ), or round plainly
    sweeps     over all vectors after feedback, at most
    damping    added to the diagonal of the second moments, as a share of its mean; raised when needed
    refits     rounds of rounding again at scales nearby, with a codebook that is fitted to the layer's outputs
    """

    rotate: str = "both"
    feedback: bool = True
    damping: float = 0.01
    refits: int = 1
    sweeps: int = 6

    def __post_init__(self) -> None:
        self.check("rotate", ROTATIONS)
        if not 0 <= self.damping < 1 or min(self.refits, self.sweeps) < 0:
            got = f"damping is {self.damping}, refits {self.refits} and sweeps {self.sweeps}"
            raise UsageError(f"{got}; damping is a share, from 0 to less than 1, and the others are counts, 0 or more")

    def check(self, name: str, allowed: Sequence[str]) -> None:
        """UsageError where the field `name` has none of the values `allowed`."""
        if (value := getattr(self, name)) not in allowed:
            raise UsageError(f"{type(self).__name__}.{name} is {value!r}; choose one of {', '.join(allowed)}")

    def start(self, layers: Sequence[nn.Module], generator: torch.Generator) -> Self:
        """The method with what it learns from all layers together. `generator` must be left as it is."""
        return self

    def layer(self, W: Tensor, H: Tensor, bias: Tensor | None, generator: torch.Generator) -> QuantLinear:
        """The quantized layer of W, fp32 [out, n], for inputs with second moments H, fp64 [n, n].

        `quantize` gives both in units of about their largest number, so that fp32 holds the squares of both.
        """

    def signs(self, W: Tensor, generator: torch.Generator) -> Signs:
        """Random signs for the inputs and the outputs of W [out, n], on its device; None where it is not rotated."""
        s_in = random_signs(W.shape[1], generator).to(W.device) if self.rotate != "none" else None
        s_out = random_signs(W.shape[0], generator).to(W.device) if self.rotate == "both" else None
        return s_in, s_out

    def prepare(self, W: Tensor, H: Tensor, signs: Signs, dim: int) -> tuple[Tensor, Factor]:
        """W [out, n] and H [n, n] as rounding wants them: in the basis of the codes, in vectors of `dim` weights."""
        if signs[0] is not None:
            H = rotate(rotate(H, signs[0].double()).T, signs[0].double())
        H, n = pad(pad(H, dim).T, dim), len(H)
        H.diagonal()[n:] = 1e-9 * H.diagonal()[:n].mean()  # padding is cut off again: its error hardly counts
        return pad(rotated(W, signs), dim), factorize(H, self.damping)

    def round(self, W: Tensor, factor: Factor, book: Codebook, fitted: bool = False) -> Rounded:
        """Codes for a W and a factor that are prepared. fitted: the codebook is affine, and refits may change it."""
        best = round_matrix(W, factor, book, row_scales(W), self.feedback)
        for _ in range(self.refits):
            book = refit(W, best.coded, factor.H) if fitted else book
            other = round_matrix(W, factor, book, [near * best.coded.scale for near in NEARBY], self.feedback)
            if other.loss.sum() >= best.loss.sum():
                break
            best = other
        return swept(W, best, factor.H, self.sweeps) if self.feedback else best


def rotated(W: Tensor, signs: Signs) -> Tensor:
    """W [out, in], rotated on the sides whose signs are given."""
    W = W if signs[0] is None else rotate(W, signs[0])
    return W if signs[1] is None else rotate(W.T, signs[1]).T.contiguous()


def pad(x: Tensor, dim: int) -> Tensor:
    """The last dimension, with zeros added up to a multiple of `dim`."""
    return nn.functional.pad(x, (0, -x.shape[-1] % dim))


def sample_vectors(W: Tensor, dim: int, count: int) -> Tensor:
    """At most `count` vectors of W, evenly spread, each row divided by its root mean square: fp32 [<= count, d]."""
    x = (W / W.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)).reshape(-1, dim)
    count = min(count, len(x))
    # A constant step could divide the length of a row, and then meet the same few columns in all rows.
    return x[torch.arange(count, device=x.device) * (len(x) - 1) // max(1, count - 1)]
