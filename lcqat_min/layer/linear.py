"""The layer: a linear map whose weight is decoded from codes on every forward pass, and trains end to end.

    y = x W_hat^T + bias
    W_hat = s_out * U_out [ r * D ] U_in * s_in * c

    D        decoded weights: A q + b for each vector of d weights along the inputs      (codebook/affine.py)
    r        row_scale [out], in the basis of the codes; learned
    U, s     block-Hadamard matrices and fixed random signs; absent when not rotated     (layer/rotation.py)
    c        col_scale [in], in the basis of the inputs; learned

LC-QAT's SU is s_in * c. Its SV is s_out times a scale *outside* of U_out; ours is inside, so that each row of codes has
a scale of its own from the start.

QuantLinear is what all layers share. A kind of layer says how its weights are decoded, which indices they stand for,
how large one unit of each parameter is, and which settings bring it back from a file. AffineLinear is LC-QAT's: its
latents [out, n k / d] (fp32) round to the digits q with a surrogate gradient. Other kinds are in systems/.

Rotation and scales act on the weight, not on the activations: with many tokens per step that costs less time and keeps
less memory (scripts/bench_cpu.py measures a step). Inputs that do not fill a last vector are padded with zeros, whose
decoded weights are cut off. The maths runs in fp32 also under autocast; leave torch.set_float32_matmul_precision at its
default, since "high" and "medium" round the weight as well.

Limits: each forward pass writes the dense weight. Inference from packed codes does not need that (packing/layer.py).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..codebook.affine import AffineCodebook
from ..codebook.digits import index_of
from ..codebook.matrix import Codebook, CodedMatrix
from .rotation import mix, unrotate
from .surrogate import round_to_levels, sign_of

Signs = tuple[Tensor | None, Tensor | None]  # s_in fp32 [in], s_out fp32 [out]; None: that side is not rotated
MARGIN = 0.05  # of half a bin: how far a starting latent stays from the boundary, so that rounding it is safe


class QuantLinear(nn.Module):
    """Scales, rotation, bias and the forward pass. A subclass gives the methods that have no body here.

    coded: the codes and scales to start from. in_features: may be less than the columns of codes, which are padded.
    signs: of the rotation, for the inputs and the outputs.
    """

    method = ""  # the name of the method that makes this kind of layer, in files and in systems/
    learned: tuple[str, ...] = ()  # names of the codebook's parameters; layers may share them

    def __init__(self, coded: CodedMatrix, in_features: int, bias: Tensor | None, signs: Signs):
        super().__init__()
        self.in_features, self.out_features = in_features, len(coded.scale)
        self.row_scale = nn.Parameter(coded.scale.float().clone())
        self.col_scale = nn.Parameter(torch.ones(in_features, dtype=torch.float32, device=coded.scale.device))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("signs_in", signs[0])
        self.register_buffer("signs_out", signs[1])

    def decoded(self) -> Tensor:
        """D: weights in the basis and unit of the codes, fp32 [out, in padded to whole vectors], with gradient."""

    def indices(self) -> Tensor:
        """The codebook index of every vector as the forward pass uses it, int64 [out, vectors]."""

    def codebook(self) -> Codebook:
        """What the indices stand for, in fp32, without gradient."""

    def settings(self) -> dict[str, object]:
        """Arguments that bring the layer back from a file, besides tensors, as plain JSON values."""
        return {}

    def units(self) -> dict[str, tuple[str, float]]:
        """Parameter -> its group and the size of one unit of it, which the rates of qat/config.py count in."""
        return {name: ("scales", root_mean_square(getattr(self, name))) for name in ("row_scale", "col_scale")}

    @property
    def weight(self) -> Tensor:
        """W_hat, fp32 [out, in], with gradient."""
        if (dtype := self.row_scale.dtype) != torch.float32:
            raise TypeError(f"a quantized layer trains in float32, not {dtype}; for speed use torch.autocast instead")
        with torch.autocast(self.row_scale.device.type, enabled=False):
            W = self.decoded()[:, : self.in_features] * self.row_scale[:, None]
            W = W if self.signs_out is None else unrotate(W.T, self.signs_out).T
            return W * self.col_scale if self.signs_in is None else mix(W) * (self.signs_in * self.col_scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x, or of autocast where that is on."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def set_row_scale(self, scale: Tensor) -> None:
        """Change r in place; the codes stay as they are."""
        self.row_scale.data.copy_(scale)

    def extra_repr(self) -> str:
        sides = [side for side in ("in", "out") if getattr(self, f"signs_{side}") is not None]
        return f"in={self.in_features}, out={self.out_features}, rotated={'+'.join(sides) or 'no'}"


class AffineLinear(QuantLinear):
    """w_hat = A q + b with q rounded from latents: the paper's lattice (4 levels), bit-planes (2 levels).

    target: fp32 [out, n], in units of the row scales: what each vector was rounded from, which the latents then keep;
    None: they start on the codes. estimator: of the gradient (layer/surrogate.py). learn_codebook: A and b train.
    """

    method = "lcqat"
    learned = ("A", "b")

    def __init__(
        self,
        coded: CodedMatrix[AffineCodebook],
        in_features: int,
        bias: Tensor | None,
        signs: Signs,
        target: Tensor | None = None,
        estimator: str = "ste",
        learn_codebook: bool = True,
    ):
        super().__init__(coded, in_features, bias, signs)
        self.levels, self.estimator = coded.codebook.levels, estimator
        self.A = nn.Parameter(coded.codebook.A.clone(), requires_grad=learn_codebook)
        self.b = nn.Parameter(coded.codebook.b.clone(), requires_grad=learn_codebook)
        self.latent = nn.Parameter(starting_latents(coded, target).flatten(1))

    def digits(self) -> Tensor:
        """q, centred digits as the forward pass uses them, fp32 [out, vectors, k]."""
        two = self.levels == 2
        q = sign_of(self.latent, self.estimator) if two else round_to_levels(self.latent, 3, self.estimator) - 1.5
        return q.view(self.out_features, -1, self.A.shape[1])

    def decoded(self) -> Tensor:
        q = self.digits()
        D = q * self.A if self.A.numel() == 1 else q @ self.A.T  # a grid needs no product of matrices
        return (D + self.b).flatten(1)

    @torch.no_grad()
    def indices(self) -> Tensor:
        return index_of(self.digits(), self.levels)

    def codebook(self) -> AffineCodebook:
        return AffineCodebook(self.A.detach(), self.b.detach(), self.levels)

    def settings(self) -> dict[str, object]:
        return {"levels": self.levels, "estimator": self.estimator, "learn_codebook": self.A.requires_grad}

    def units(self) -> dict[str, tuple[str, float]]:
        """A bin is 1 wide on a grid of four levels and 2 from -1 to +1. b starts near zero, so A is its measure."""
        size = root_mean_square(self.A)
        bin_width = 2.0 if self.levels == 2 else 1.0
        return super().units() | {"latent": ("latents", bin_width), "A": ("codebooks", size), "b": ("codebooks", size)}


def starting_latents(coded: CodedMatrix[AffineCodebook], target: Tensor | None = None) -> Tensor:
    """Latents that round to `coded.index`: fp32 [out, vectors, k], in bins (4 levels: 0..3; 2: -1, +1).

    target None: exactly on the digits, as in LC-QAT's release. Otherwise each latent also keeps what rounding lost.
    With the residual e = target - w_hat, flipping bit q_k changes the squared error by
    4 |a_k|^2 q_k (q_k + a_k^T e / |a_k|^2), so  v = q + A^T e / |a|^2  is a bit's margin: q_k v_k is 0 where a flip
    would cost nothing and 1 where the target lies on the codeword. For a scalar grid v is the unrounded weight in bins.
    Both only as far as the bin reaches: v stays inside, so that it rounds to its code.
    """
    book = coded.codebook
    centre, limit = (0.0, 1 - MARGIN) if book.levels == 2 else (1.5, (1 - MARGIN) / 2)  # half a bin
    v = book.digits(coded.index) + centre
    if target is None:
        return v
    e = target.view(*coded.index.shape, book.dim) - book.decode(coded.index)
    norm = book.A.square().sum(0).clamp(min=1e-12)  # a matrix of zeros is fitted by columns of zeros
    return v + (e @ book.A / norm).clamp(-limit, limit)


def quant_layers(model: nn.Module) -> list[tuple[str, QuantLinear]]:
    """Names and modules of the quantized layers in training."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def in_units(x: Tensor) -> tuple[Tensor, float]:
    """x in units of a power of four near its largest number, so that fp32 holds its squares; and that unit.

    No digit of x changes.
    """
    largest = x.abs().max().item()
    unit = 4.0 ** max((math.frexp(largest)[1] - 1) // 2, -63) if largest else 1.0  # a smaller one would be subnormal
    return x / unit, unit


def root_mean_square(x: Tensor) -> float:
    """sqrt(mean(x^2))."""
    x, unit = in_units(x.detach())
    return x.square().mean().sqrt().item() * unit
