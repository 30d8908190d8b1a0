"""What a quantized model costs and how it uses its codes: both counted, neither assumed.

"2 bits" is the size of the codes alone. What has to be stored besides them counts as well (packing/layer.py):

    codes      every row of codes is one bit string, padded to whole bytes
    codebooks  A and b, or the table (a shared table once), 16 bits a number
    scales     row_scale [out] and col_scale [in], 16 bits a number
    signs      of the rotations, 1 bit each, padded to whole bytes

    bits a weight     all four, divided by the number of weights in the quantized layers
    bits a parameter  the whole model: embeddings, norms, biases and skipped layers at their own width too

For a [256, 256] matrix with 4 x 8 planes: 2 + (36 + 512) * 16 / 65536 + 512 / 65536 = 2.14 bits a weight;
for [2048, 2048] 2.02. A latent is no part of the result: only its rounded code is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..codebook.digits import digits_of
from ..errors import UsageError
from ..layer.linear import QuantLinear, StepLinear
from ..ptq.model import linear_layers
from .convert import forms_of
from .layer import Form, PackedLinear

PART_OF = {
    "weight": "codes",
    "A": "codebooks",
    "b": "codebooks",
    "table": "codebooks",
    "row_scale": "scales",
    "col_scale": "scales",
    "signs_in": "signs",
    "signs_out": "signs",
}
QUANTIZED = ("codes", "codebooks", "scales", "signs")


@dataclass(frozen=True)
class Bits:
    """Bits of a model on file.

    parts: part -> bits. weights: how many weights are quantized; where none is, those of the linear layers.
    parameters: how many the model had before quantization.
    """

    parts: dict[str, int]
    weights: int
    parameters: int

    @property
    def per_weight(self) -> float:
        """Bits a quantized weight, with all side data; 16 or 32 for an unquantized model."""
        own = sum(self.parts[part] for part in QUANTIZED) or self.parts["linear layers"]
        return own / self.weights if self.weights else 0.0

    @property
    def per_parameter(self) -> float:
        """Bits a parameter of the whole model."""
        return sum(self.parts.values()) / self.parameters

    @property
    def bytes(self) -> int:
        """Size of all tensors on file."""
        return sum(self.parts.values()) // 8

    def __str__(self) -> str:
        rows = []
        for part, bits in self.parts.items():
            share = f"{bits / self.weights:>10.4f} bits a weight" if part in QUANTIZED and bits else ""
            rows += [f"{part:<14}{bits // 8:>12,} bytes{share}"] if bits else []
        total = f"{'in all':<14}{self.bytes:>12,} bytes{self.per_parameter:>10.4f} bits a parameter"
        weight = f"{self.per_weight:.4f} bits a weight in {self.weights:,} linear weights"
        return "\n".join([*rows, total, weight])


def bits_per_weight(model: nn.Module, dtype: torch.dtype | None = None) -> Bits:
    """Count the bits that `model` takes on file. It may be in training, packed, or not quantized at all.

    dtype: that unquantized parameters are saved in; their own where none is given.
    """
    parts = dict.fromkeys((*QUANTIZED, "linear layers", "embeddings", "other"), 0)
    forms = forms_of(model)
    counted: set[int] = set()
    for name, form in forms.items():
        for key, (stored, shape) in form.tensors(name).items():
            parts[PART_OF[key]] += 8 * stored.itemsize * torch.Size(shape).numel()
        counted |= {id(p) for key, p in model.get_submodule(name).named_parameters() if key != "bias"}
    linear = {id(layer.weight): layer.weight.numel() for _, layer in linear_layers(model)}
    embeddings = _embeddings(model)
    parameters = weights = sum(form.inputs * form.outputs for form in forms.values())
    for p in model.parameters():
        if id(p) not in counted:
            part = "linear layers" if id(p) in linear else "embeddings" if id(p) in embeddings else "other"
            parts[part] += 8 * p.numel() * (dtype if dtype and p.is_floating_point() else p.dtype).itemsize
            parameters += p.numel()
    kept = model.state_dict().keys()
    parts["other"] += sum(
        8 * buffer.nbytes
        for name, buffer in model.named_buffers()
        if name in kept and name.rpartition(".")[0] not in forms
    )
    return Bits(parts, weights or sum(linear.values()), parameters)


def _embeddings(model: nn.Module) -> set[int]:
    """Identities of the weights of embeddings and of the output head."""
    layers = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {id(layer.weight) for layer in (*layers, *([] if head is None else [head]))}


@dataclass(frozen=True)
class CodeStats:
    """How a layer uses its codes.

    usage: int64 [2^m], vectors on each codeword. entropy: of the usage, bits a vector, at most m.
    outer: share of digits on an outermost level; None where digits have no inner levels, or there are none.
    beyond: share of latents outside the outermost levels; None for a layer without latents.
    flips: share of vectors whose code differs from an earlier one; None without one.
    """

    usage: Tensor
    entropy: float
    outer: float | None
    beyond: float | None
    flips: float | None


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    """Codes of every quantized layer, by name, int64 [out, vectors]: a snapshot to compare with later."""
    return {
        name: layer.codes() for name, layer in model.named_modules() if isinstance(layer, (QuantLinear, PackedLinear))
    }


@torch.no_grad()
def code_stats(model: nn.Module, before: dict[str, Tensor] | None = None) -> dict[str, CodeStats]:
    """Code statistics of every quantized layer of `model`, by name; a layer given by itself has the name "".

    before: an earlier `codes_of(model)`, to count flips. ValueError when it is of another model.
    """
    codes = codes_of(model)
    if before is not None and _shapes(before) != _shapes(codes):
        raise UsageError(
            "`before` has other layers or shapes than the model: give what codes_of returned for the same model"
        )
    return {
        name: _stats(model.get_submodule(name), form, codes[name], before and before[name])
        for name, form in forms_of(model).items()
    }


def _shapes(codes: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: index.shape for name, index in codes.items()}


def _stats(layer: nn.Module, form: Form, index: Tensor, before: Tensor | None) -> CodeStats:
    usage = torch.bincount(index.flatten(), minlength=1 << form.bits)
    p = usage[usage > 0].double() / index.numel()
    outer = flips = None
    if form.levels > 2:
        outermost = (form.levels - 1) / 2
        digits = digits_of(index, form.digits, form.levels)
        outer = (digits.abs() == outermost).double().mean().item()
    if before is not None:
        flips = (index != before).double().mean().item()
    return CodeStats(usage, -(p * p.log2()).sum().item(), outer, _beyond(layer), flips)


def _beyond(layer: nn.Module) -> float | None:
    if not hasattr(layer, "latent"):
        return None
    if isinstance(layer, StepLinear):
        distance, outermost = layer.latent / layer.row_scale[:, None], 1.5
    elif layer.levels == 2:
        distance, outermost = layer.latent, 1.0
    else:
        outermost = (layer.levels - 1) / 2
        distance = layer.latent - outermost
    return (distance.abs() > outermost).double().mean().item()
