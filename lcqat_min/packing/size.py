"""What a quantized model costs in a file: counted from what is stored, not assumed.

"2 bits" is the size of the packed codes alone. What has to be stored besides them counts as well (packing/layer.py):

    codes      every row of codes is one bit string, padded to whole bytes
    codebooks  A and b, or the table (a shared table once), 16 bits per number
    scales     row_scale [out] and col_scale [in], 16 bits per number
    signs      of the rotations, 1 bit each, padded to whole bytes

    bits per weight     all four, divided by the number of weights in the quantized layers
    bits per parameter  the whole model: embeddings, norms, biases and skipped layers at their own width too

For a [256, 256] matrix with 4 x 8 planes: 2 + (36 + 512) * 16 / 65536 + 512 / 65536 = 2.14 bits per weight;
for [2048, 2048] 2.02. Latents are not part of the result: only the codes that they round to are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..ptq.select import linear_layers
from .convert import specs_of

PARTS = {
    "codes": ("weight",),
    "codebooks": ("A", "b", "table"),
    "scales": ("row_scale", "unit", "col_scale"),
    "signs": ("signs_in", "signs_out"),
}
PART_OF = {key: part for part, keys in PARTS.items() for key in keys}


@dataclass(frozen=True)
class Bits:
    """Bits of a model in a file.

    parts: part -> bits. weights: how many weights are quantized; for an unquantized model, those of linear layers.
    parameters: how many the model had before quantization.
    """

    parts: dict[str, int]
    weights: int
    parameters: int

    @property
    def per_weight(self) -> float:
        """Bits per quantized weight, with all side data; 16 or 32 for an unquantized model."""
        own = sum(self.parts[part] for part in PARTS) or self.parts["linear layers"]
        return own / self.weights if self.weights else 0.0

    @property
    def per_parameter(self) -> float:
        """Bits per parameter of the whole model."""
        return sum(self.parts.values()) / self.parameters

    @property
    def bytes(self) -> int:
        """Size of all tensors in the file."""
        return sum(self.parts.values()) // 8

    def __str__(self) -> str:
        rows = []
        for part, bits in self.parts.items():
            share = f"{bits / self.weights:>10.4f} bits per weight" if part in PARTS and bits else ""
            rows += [f"{part:<14}{bits // 8:>12,} bytes{share}"] if bits else []
        total = f"{'in all':<14}{self.bytes:>12,} bytes{self.per_parameter:>10.4f} bits per parameter"
        weight = f"{self.per_weight:.4f} bits per weight in {self.weights:,} linear weights"
        return "\n".join([*rows, total, weight])


def bits_per_weight(model: nn.Module, dtype: torch.dtype | None = None) -> Bits:
    """Count the bits that `model` takes in a file. It may be in training, packed, or not quantized at all.

    dtype: in which unquantized parameters are saved; by default their own.
    """
    parts = dict.fromkeys((*PARTS, "linear layers", "embeddings", "other"), 0)
    specs = specs_of(model)
    for name, spec in specs.items():
        for key, (stored, shape) in spec.tensors(name).items():
            parts[PART_OF[key]] += 8 * stored.itemsize * math.prod(shape)
    quantized = parameters = sum(spec.inputs * spec.outputs for spec in specs.values())
    linear = {id(layer.weight): layer.weight.numel() for _, layer in linear_layers(model)}
    embeddings = _embeddings(model)
    saved = model.state_dict().keys()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        layer, _, key = name.rpartition(".")
        if name in saved and (layer not in specs or key == "bias"):
            is_parameter = isinstance(value, nn.Parameter)
            width = dtype if dtype and is_parameter and value.is_floating_point() else value.dtype
            part = "linear layers" if id(value) in linear else "embeddings" if id(value) in embeddings else "other"
            parts[part] += 8 * width.itemsize * value.numel()
            parameters += value.numel() if is_parameter else 0
    return Bits(parts, quantized or sum(linear.values()), parameters)


def _embeddings(model: nn.Module) -> set[int]:
    """Identities of the weights of embeddings and of the output head."""
    layers = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {id(layer.weight) for layer in (*layers, *([] if head is None else [head]))}
