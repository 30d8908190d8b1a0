"""From layers in training to packed layers and back, and the rounding of their numbers in between.

`to_storage_precision` rounds a model in training to the numbers that its file will hold. From then on the model, its
packed layers and its dense export are one and the same map: what was measured is what is shipped.

Limits: latents are not stored. Layers that come back from packed ones start on their codes; they give the same outputs,
but have lost which codes were about to flip.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from ..errors import UsageError
from ..layer.linear import QuantLinear, quant_layers
from ..layer.stored import layer_from, round_to_storage, tensors_of
from ..systems import layer_of
from .layer import PackedLinear, PackedSpec, share_codebooks


def specs_of(model: nn.Module) -> dict[str, PackedSpec]:
    """PackedSpec of every quantized layer of `model`, by name: of those in training and of packed ones."""
    names = {id(module): name for name, module in model.named_modules()}
    holders: dict[int, list[str]] = {}
    for name, layer in quant_layers(model):
        for key in layer.learned[:1]:
            holders.setdefault(id(getattr(layer, key)), []).append(name)
    owner_of = {name: shared[0] for shared in holders.values() if len(shared) > 1 for name in shared}
    specs = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            specs[name] = _spec(layer, owner_of.get(name, ""))
        elif isinstance(layer, PackedLinear):  # in a part of a packed model its owner has another name than there
            owner = names.get(id(layer.owner[0]), layer.spec.owner) if layer.spec.owner else ""
            specs[name] = replace(layer.spec, owner=owner)
    return specs


def pack_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Packed layers of `model`, by name, on its device. The model is not changed.

    UsageError for scales or codebooks that fp16 cannot hold.
    """
    layers = {}
    for name, spec in specs_of(model).items():
        layer = model.get_submodule(name)
        layers[name] = _renamed(layer, spec) if isinstance(layer, PackedLinear) else _pack(layer, spec, name)
    share_codebooks(layers)
    return layers


def unpack_layers(layers: dict[str, PackedLinear]) -> dict[str, QuantLinear]:
    """Layers in training with the same weights, by name: latents on the codes, shared codebooks shared again."""
    made = {}
    for name, layer in layers.items():
        kind, spec = layer_of(layer.spec.method), layer.spec
        made[name] = layer_from(kind, layer.stored(), spec.inputs, layer.bias, spec.settings)
        if spec.owner in made:
            for key in kind.learned:
                setattr(made[name], key, getattr(made[spec.owner], key))
    return made


def to_storage_precision(model: nn.Module) -> None:
    """Round scales and codebooks of a model in training, in place, to the numbers that its file will hold.

    Codes stay the same, and doing it twice changes nothing more. UsageError, before anything is changed, for numbers
    that fp16 cannot hold.
    """
    for name, layer in quant_layers(model):
        _stored(layer, name)
    for _, layer in quant_layers(model):
        round_to_storage(layer)


def _spec(layer: QuantLinear, owner: str) -> PackedSpec:
    book = layer.codebook()
    shapes = {key: list(value.shape) for key, value in book.tensors().items()}
    rotated = layer.signs_in is not None, layer.signs_out is not None
    sizes = layer.in_features, layer.out_features, book.dim, book.bits
    return PackedSpec(layer.method, *sizes, shapes, *rotated, layer.bias is not None, owner, layer.settings())


def _stored(layer: QuantLinear, name: str) -> dict[str, torch.Tensor]:
    try:
        return tensors_of(layer)
    except ValueError as error:
        raise UsageError(f"layer {name!r}: {error}") from error


def _renamed(layer: PackedLinear, spec: PackedSpec) -> PackedLinear:
    if layer.spec == spec:
        return layer
    twin = copy.copy(layer)
    twin.spec = spec
    return twin


@torch.no_grad()
def _pack(layer: QuantLinear, spec: PackedSpec, name: str) -> PackedLinear:
    packed, tensors = PackedLinear(spec, name), _stored(layer, name)
    for key in spec.tensors(name):
        setattr(packed, key, tensors[key])
    if layer.bias is not None:
        packed.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return packed
