"""How a quantized model uses its codebooks: counted from the indices of its layers.

    usage     vectors on each codeword
    entropy   - sum_i p_i log2 p_i with p = usage / vectors, bits per vector; m if all 2^m codewords occur equally often
    flips     share of vectors whose index differs from an earlier snapshot

Limits: the entropy of the indices one by one. It does not see what neighbours say about each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..layer.stored import codebook_of
from ..packing.convert import pack_layers


@dataclass(frozen=True)
class CodeStats:
    """Statistics of one layer. usage: int64 [2^m]. entropy: bits per vector. flips: None without a snapshot."""

    usage: Tensor
    entropy: float
    flips: float | None


def indices_of(model: nn.Module) -> dict[str, Tensor]:
    """Codebook indices of every quantized layer, by name, int64 [out, vectors]: a snapshot to compare with later."""
    modules = model.named_modules()
    return {name: layer.indices() for name, layer in modules if callable(getattr(layer, "indices", None))}


def code_stats(model: nn.Module, before: dict[str, Tensor] | None = None) -> dict[str, CodeStats]:
    """Statistics of every quantized layer of `model`, by name; a layer given by itself has the name "".

    before: an earlier `indices_of(model)`, to count flips. ValueError if it is of another model.
    """
    indices = indices_of(model)
    if before is not None and _shapes(before) != _shapes(indices):
        raise UsageError("`before` has other layers or shapes than the model: give what indices_of returned for it")
    stats = {}
    packed = pack_layers(model)
    for name, index in indices.items():
        usage = torch.bincount(index.flatten(), minlength=1 << codebook_of(packed[name].stored()).bits)
        p = usage[usage > 0].double() / usage.sum()
        flips = None if before is None else (index != before[name]).double().mean().item()
        stats[name] = CodeStats(usage, -(p * p.log2()).sum().item(), flips)
    return stats


def _shapes(indices: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: index.shape for name, index in indices.items()}
