"""The layer: a linear map whose weight is decoded from codes on every forward pass, and trains end to end.

    y = x W_hat^T + bias
    W_hat = s_out * H_out [ r * decode(codes) ] H_in * s_in * c

    decode   per vector of d weights along the inputs: A q + b, or T[index]         (codebook/affine.py)
    r        row_scale [out], in the basis of the codes; learned
    H, s     block-Hadamard matrices and fixed random signs; absent when not rotated (layer/rotation.py)
    c        col_scale [in], in the basis of the inputs; learned

LC-QAT's SU is s_in * c. Its SV is s_out times a scale *outside* H_out; ours sits inside, so that each row of
codes has a scale of its own from the start. What is learned, by kind of layer:

    AffineLinear  latents [out, n k / d] (fp32) round to digits q, surrogate gradient; r, c, A, b
    StepLinear    latents [out, in] are weights; q = round(w / r): r is a learned step (LSQ; ParetoQ's grid)
    TableLinear   codes frozen, the table learned: what a lookup leaves to train

All of rotation and scales acts on the weight, not on the activations: with many tokens a step that costs less
time and keeps less memory (scripts/bench_cpu.py measures a step). Inputs that do not fill a last vector are
padded with zeros, whose decoded weights are cut off. The maths runs in fp32 also under autocast; leave
torch.set_float32_matmul_precision at its default, since "high" and "medium" round the weight as well.

Gives up: each forward writes the dense weight. For inference from packed codes that is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..codebook.affine import AffineCodebook
from ..codebook.digits import digits_of, index_of
from ..codebook.matrix import Rounded
from .rotation import mix, unrotate
from .surrogate import round_to_levels, sign_of
from .units import root_mean_square

MARGIN = 0.05  # of half a bin: how far a starting latent stays from the boundary, so that rounding it is safe


class QuantLinear(nn.Module):
    """Scales, rotation, bias and the forward pass; subclasses give `decoded()`, `indices()` and more `units()`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        row_scale: Tensor,
        bias: Tensor | None,
        signs_in: Tensor | None,
        signs_out: Tensor | None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.row_scale = nn.Parameter(row_scale.float().clone())
        self.col_scale = nn.Parameter(torch.ones(in_features, dtype=torch.float32, device=row_scale.device))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("signs_in", signs_in)
        self.register_buffer("signs_out", signs_out)

    def decoded(self) -> Tensor:
        """Weights in the basis and unit of the codes, fp32 [out, in padded to whole vectors]."""
        raise NotImplementedError

    def indices(self) -> Tensor:
        """Codebook index of every vector as the forward pass uses it, int64 [out, vectors]."""
        raise NotImplementedError

    def units(self) -> dict[str, tuple[str, float]]:
        """Parameter name -> its group (scales, latents or codebooks) and the size of one unit of its learning rate."""
        return {name: ("scales", root_mean_square(self.get_parameter(name))) for name in ("row_scale", "col_scale")}

    @property
    def weight(self) -> Tensor:
        """W_hat, fp32 [out, in], with gradient."""
        if self.row_scale.dtype != torch.float32:
            raise TypeError(
                f"a quantized layer works in float32; its parameters are {self.row_scale.dtype}. "
                "For speed use torch.autocast instead of model.half() or model.bfloat16()."
            )
        with torch.autocast(self.row_scale.device.type, enabled=False):
            W = self.decoded()[:, : self.in_features] * self.row_scale[:, None]
            if self.signs_out is not None:
                W = unrotate(W.T, self.signs_out).T
            if self.signs_in is not None:
                W = mix(W)
                return W * (self.signs_in * self.col_scale)
            return W * self.col_scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x, or of autocast where that is on."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        sides = [side for side in ("in", "out") if getattr(self, f"signs_{side}") is not None]
        return f"in={self.in_features}, out={self.out_features}, rotated={'+'.join(sides) or 'no'}"


class AffineLinear(QuantLinear):
    """w_hat = A q + b with q rounded from latents: the paper's lattice (4 levels), bit-planes (2 levels)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rounded: Rounded,
        bias: Tensor | None,
        signs_in: Tensor | None,
        signs_out: Tensor | None,
        estimator: str,
        learn_codebook: bool,
        start_on_codes: bool,
    ):
        super().__init__(in_features, out_features, rounded.scale, bias, signs_in, signs_out)
        self.levels, self.estimator = rounded.codebook.levels, estimator
        self.A = nn.Parameter(rounded.codebook.A.clone(), requires_grad=learn_codebook)
        self.b = nn.Parameter(rounded.codebook.b.clone(), requires_grad=learn_codebook)
        self.latent = nn.Parameter(starting_latents(rounded, start_on_codes).flatten(1))

    def digits(self) -> Tensor:
        """q, centred digits as the forward pass uses them, fp32 [out, vectors, k]."""
        if self.levels == 2:
            q = sign_of(self.latent, self.estimator)
        else:
            top = self.levels - 1
            q = round_to_levels(self.latent, top, self.estimator) - top / 2
        return q.view(self.out_features, -1, self.A.shape[1])

    def decoded(self) -> Tensor:
        q = self.digits()
        return (q * self.A + self.b).flatten(1) if self.A.numel() == 1 else (q @ self.A.T + self.b).flatten(1)

    @torch.no_grad()
    def indices(self) -> Tensor:
        return index_of(self.digits(), self.levels)

    def units(self) -> dict[str, tuple[str, float]]:
        """A latent's unit is a bin: 1 on a grid, 2 from -1 to +1. b starts near zero, so it is measured by A."""
        latents, codebooks = ("latents", 2.0 if self.levels == 2 else 1.0), ("codebooks", root_mean_square(self.A))
        return super().units() | {"latent": latents, "A": codebooks, "b": codebooks}

    def codebook(self) -> AffineCodebook:
        """The learned (A, b) as a codebook."""
        return AffineCodebook(self.A.detach(), self.b.detach(), self.levels)


class StepLinear(QuantLinear):
    """Four uniform levels and a learned step a row: q = clip(round(w / r + 3/2), 0, 3) - 3/2, w_hat = r q.

    Autograd with the clipped straight-through gradient gives LSQ's d w_hat / d r = q - w/r inside the grid
    and +-3/2 outside. In ParetoQ's units (arXiv 2502.02631, SEQ) alpha = 2 r: levels +-alpha/4, +-3 alpha/4.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rounded: Rounded,
        bias: Tensor | None,
        signs_in: Tensor | None,
        signs_out: Tensor | None,
    ):
        super().__init__(in_features, out_features, rounded.scale, bias, signs_in, signs_out)
        self.latent = nn.Parameter((starting_latents(rounded).flatten(1) - 1.5) * rounded.scale[:, None])

    def decoded(self) -> Tensor:
        return round_to_levels(self.latent / self.row_scale[:, None] + 1.5, 3, "clipped") - 1.5

    @torch.no_grad()
    def indices(self) -> Tensor:
        return index_of(self.decoded()[..., None], 4)

    def units(self) -> dict[str, tuple[str, float]]:
        """Latents are weights here, so their unit is the mean step."""
        return super().units() | {"latent": ("latents", self.row_scale.detach().mean().item())}


class TableLinear(QuantLinear):
    """w_hat = table[index], codes frozen. The table may be shared by layers (pass the same Parameter)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rounded: Rounded,
        bias: Tensor | None,
        signs_in: Tensor | None,
        signs_out: Tensor | None,
        table: nn.Parameter,
    ):
        super().__init__(in_features, out_features, rounded.scale, bias, signs_in, signs_out)
        self.table = table
        self.register_buffer("index", rounded.index.to(torch.int32))

    def decoded(self) -> Tensor:
        return F.embedding(self.index, self.table.to(self.index.device)).flatten(1)

    @torch.no_grad()
    def indices(self) -> Tensor:
        return self.index.long()

    def units(self) -> dict[str, tuple[str, float]]:
        return super().units() | {"table": ("codebooks", root_mean_square(self.table))}


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Names and modules of the quantized layers that train."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear))


def starting_latents(rounded: Rounded, on_codes: bool = False) -> Tensor:
    """Latents that round to `rounded.index`: fp32 [out, vectors, k], in bins (4 levels: 0..3; 2: -1, +1).

    on_codes: exactly on the digits, as LC-QAT's release does. Otherwise each latent also keeps what rounding
    threw away. With the residual e = target - w_hat, flipping bit q_k changes the squared error by
    4 |a_k|^2 q_k (q_k + a_k^T e / |a_k|^2), so  v = q + A^T e / |a|^2  is a bit's margin: q_k v_k is 0 where
    a flip would cost nothing and 1 where the target sits on the codeword. For a scalar grid v is the
    unrounded weight in bins. Both as far as the bin reaches: v stays inside, so that it rounds to its code.
    """
    book = rounded.codebook
    k = book.A.shape[1]
    q = digits_of(rounded.index, k, book.levels)
    centre = 0.0 if book.levels == 2 else (book.levels - 1) / 2
    if on_codes:
        return q + centre
    half_bin = (1.0 if book.levels == 2 else 0.5) * (1 - MARGIN)
    e = rounded.target.view(*rounded.index.shape, book.dim) - book.decode(rounded.index)
    norm = book.A.square().sum(0).clamp(min=1e-12)  # a matrix of zeros is fitted by columns of zeros
    return q + centre + (e @ book.A / norm).clamp(-half_bin, half_bin)
