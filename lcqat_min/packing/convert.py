"""From layers in training to packed layers and back, and the rounding of their numbers in between.

`to_storage_precision` rounds a model in training to the numbers that its file will hold. From then on the model, its
packed layers and its dense export are one and the same map: what was measured is what is shipped.

A codebook that several layers learn together is stored once, by the first of them, its owner.

Limits: latents are not stored. Layers that come back from packed ones start on their codes; they give the same outputs,
but have lost which codes were about to flip.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..layer.linear import QuantLinear, quant_layers
from ..layer.stored import layer_from, row_scale_of, tensors_of
from ..systems.table import layer_of
from .layer import PackedLinear, PackedSpec


def pack_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Packed layers of `model`, by name, on its device: of those in training and of packed ones. It is not changed.

    UsageError for scales or codebooks that fp16 cannot hold.
    """
    layers: dict[str, PackedLinear] = {}
    owners: dict[object, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            codebook, tensors, spec = layer.spec.owner or name, layer.stored(), layer.spec
        elif isinstance(layer, QuantLinear):
            codebook = id(getattr(layer, layer.learned[0])) if layer.learned else name
            tensors = tensors_of(layer, name)
            shapes = {key: list(value.shape) for key, value in tensors.items()}
            spec = PackedSpec(layer.method, shapes, layer.bias is not None, settings=layer.settings())
        else:
            continue
        owner = owners.setdefault(codebook, name)
        layers[name] = PackedLinear(replace(spec, owner=owner), layers.get(owner))
        bias = {} if layer.bias is None else {"bias": layer.bias.detach().clone()}
        layers[name].load_state_dict(tensors | bias, strict=False, assign=True)
    return layers


def unpack_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Layers in training for the packed ones of `model`, by name: latents on the codes, codebooks shared as before."""
    layers: dict[str, QuantLinear] = {}
    owners: dict[nn.Module, QuantLinear] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            kind, settings = layer_of(layer.spec.method), layer.spec.settings
            layers[name] = owners[layer] = layer_from(kind, layer.stored(), layer.bias, **settings)
            for key in kind.learned:
                setattr(layers[name], key, getattr(owners.get(layer.owner[0], layers[name]), key))
    return layers


def unquantized(model: nn.Module, layers: dict[str, PackedLinear]) -> dict[str, Tensor]:
    """Parameters and buffers of `model`, by name, except those of `layers`: embeddings, norms, biases and so on."""
    state = model.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if key.rpartition(".")[0] not in layers or key.endswith(".bias")}


@torch.no_grad()
def to_storage_precision(model: nn.Module) -> None:
    """Round scales and codebooks of a model in training, in place, to the numbers that its file will hold.

    Codes stay the same, and doing it twice changes nothing more. UsageError, before anything is changed, for numbers
    that fp16 cannot hold.
    """
    packed = pack_layers(model)
    for name, layer in quant_layers(model):
        layer.set_row_scale(row_scale_of(packed[name].stored()))
        for key in ("col_scale", *layer.learned):
            getattr(layer, key).copy_(getattr(layer, key).half())
