"""What a quantized model costs in a file: counted from what is stored, not assumed.

"2 bits" is the size of the packed codes alone. What has to be stored besides them counts as well (layer/stored.py):

    codes      every row of codes is one bit string, padded to whole bytes
    codebooks  A and b, or the table (a shared table once), 16 bits per number
    scales     row_scale [out], its unit, and col_scale [in], 16 bits per number
    signs      of the rotations, 1 bit each, padded to whole bytes

    bits per weight     all four, divided by the number of weights in the quantized layers
    bits per parameter  the whole model: embeddings, norms, biases and skipped layers at their own width too

For a [256, 256] matrix with 4 x 8 planes: 2 + (36 + 512) * 16 / 65536 + 512 / 65536 = 2.14 bits per weight;
for [2048, 2048] 2.02. Latents are not part of the result: only the codes that they round to are.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..ptq.select import linear_layers
from .convert import pack_layers, unquantized

PART_OF = {"weight": "codes", "signs_in": "signs", "signs_out": "signs"}
PART_OF |= dict.fromkeys(("row_scale", "unit", "col_scale"), "scales")  # all others are of the codebook
PARTS = ("codes", "codebooks", "scales", "signs")


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
        return (sum(self.parts[part] for part in PARTS) or self.parts["linear layers"]) / max(1, self.weights)

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
        return "\n".join([*rows, total, f"{self.per_weight:.4f} bits per weight in {self.weights:,} linear weights"])


def bits_per_weight(model: nn.Module, dtype: torch.dtype | None = None) -> Bits:
    """Count the bits that `model` takes in a file. It may be in training, packed, or not quantized at all.

    dtype: in which unquantized parameters are saved; by default their own. UsageError for numbers that fp16 cannot
    hold.
    """
    parts = dict.fromkeys((*PARTS, "linear layers", "embeddings", "other"), 0)
    layers = pack_layers(model)
    for layer in layers.values():
        for key, value in layer.named_buffers():
            parts[PART_OF.get(key, "codebooks")] += 8 * value.nbytes
    weights = parameters = sum(layer.in_features * layer.out_features for layer in layers.values())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    ends = [layer for layer in model.modules() if isinstance(layer, nn.Embedding) or id(layer) == id(head)]
    linear = [layer for _, layer in linear_layers(model)]
    kinds = {id(layer.weight): "embeddings" for layer in ends} | {id(layer.weight): "linear layers" for layer in linear}
    for value in {id(value): value for value in unquantized(model, layers).values()}.values():  # tied ones once
        is_parameter = isinstance(value, nn.Parameter)
        width = dtype if dtype and is_parameter and value.is_floating_point() else value.dtype
        parts[kinds.get(id(value), "other")] += 8 * width.itemsize * value.numel()
        parameters += value.numel() if is_parameter else 0
    return Bits(parts, weights or sum(layer.weight.numel() for layer in linear), parameters)
