"""Let transformers read packed folders: after `import lcqat_min.hf`, from_pretrained gives the packed model.

    import lcqat_min.hf
    model = AutoModelForCausalLM.from_pretrained(folder)         # a folder that save_packed wrote

transformers looks up `quant_method` of config.json in a registry. This file enters two small classes there, through the
public decorators: one holds the settings, the other replaces the linear layers by empty PackedLinear layers, which
transformers then fills by name. So generate, pipelines and evaluation harnesses work as with any other model.

A model with another head, or without a head, gets the layers that it shares with the saved one.

Limits: no saving through save_pretrained: use save_packed. No training of packed layers: load_packed(folder,
trainable=True) gives trainable ones. num_parameters() does not count packed weights: bits_per_weight(model) does.
"""

from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.logging import get_logger
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import UsageError
from ..ptq.model import QUANT_METHOD
from .format import check_tensors, declared_specs
from .layer import PackedLinear, PackedSpec


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json, kept as it was read: version, layers."""

    def __init__(self, **settings):
        self.__dict__ |= {"quant_method": QUANT_METHOD, **settings}


@register_quantizer(QUANT_METHOD)
class PackedQuantizer(HfQuantizer):
    """Checks the files against what their configuration declares, then prepares the model for them."""

    requires_calibration = True  # so transformers refuses to quantize a model with this method while it loads it
    is_trainable = False

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: list[str], **_: object) -> None:
        files = [Path(file) for file in checkpoint_files]
        specs = declared_specs(self.quantization_config.to_dict(), files[0].parent)
        check_tensors(files, specs)
        layers: dict[str, PackedLinear] = {}
        specs = _shared(specs, model)
        for name in sorted(specs, key=lambda name: specs[name].owner != name):  # owners of codebooks first
            layers[name] = PackedLinear(specs[name], layers.get(specs[name].owner))
            model.set_submodule(name, layers[name])

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: object) -> nn.Module:
        return model.requires_grad_(False)  # else a forward pass outside no_grad would keep every decoded weight

    def _dequantize(self, model: nn.Module, **kwargs: object) -> nn.Module:
        raise NotImplementedError("use export_dense(model, folder), or load_packed(folder, trainable=True)")

    def is_serializable(self) -> bool:
        get_logger(__name__).warning("a packed model is saved by lcqat_min.packing.save_packed(model, folder)")
        return False


def _shared(specs: dict[str, PackedSpec], model: nn.Module) -> dict[str, PackedSpec]:
    """Specs of the layers that `model` has too, by its own names: with a head they have one more prefix."""
    prefix = f"{model.base_model_prefix}."
    has = {name for name, _ in model.named_modules()}
    names = {name: own for name in specs for own in (prefix + name, name.removeprefix(prefix), name) if own in has}
    if not names or any(specs[name].owner not in names for name in names):
        lacks = f"{type(model).__name__} lacks layers of the packed model, such as {next(iter(specs))!r}"
        raise UsageError(f"{lacks}: load it with the class that config.json names under `architectures`")
    return {own: replace(specs[name], owner=names[specs[name].owner]) for name, own in names.items()}
