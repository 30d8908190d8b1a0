"""Let transformers read packed folders: after `import lcqat_min.hf`, from_pretrained gives the packed model.

    import lcqat_min.hf
    model = AutoModelForCausalLM.from_pretrained(folder)         # what lcqat_min.pack.save_packed wrote

transformers looks up `quant_method` of config.json in a registry. This file enters two small classes
there, through the public decorators: one holds the settings, the other puts empty PackedLinear layers in
the place of the linear ones, which transformers then fills by name. So generate, pipelines and evaluation
harnesses work as with any other model.

A model with another head, or none, gets the layers that it shares with the one that was saved.

num_parameters() counts weights, as it did before quantization; `bits_per_weight(model)` counts bits.

Limits: no saving through save_pretrained (it would not renew the digest): use save_packed. No training of
packed layers: load_packed(folder, trainable=True) gives trainable ones.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MethodType

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.logging import get_logger
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import UsageError
from ..ptq.model import METHOD
from .files import swap
from .format import check
from .layer import Form, PackedLinear, share_tables


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json, kept as it was read: version, layers, sha256."""

    def __init__(self, **settings):
        self.__dict__ |= {"quant_method": METHOD, **settings}


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Checks the file against its declared layout, then prepares the model for it."""

    requires_calibration = True  # transformers then refuses to quantize a model on the fly with this method

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: object
    ) -> None:
        if not checkpoint_files:
            raise UsageError("a packed model needs its model.safetensors: give from_pretrained the folder")
        forms = check([Path(file) for file in checkpoint_files], self.quantization_config.to_dict())
        layers = {name: PackedLinear(form, name) for name, form in _shared(forms, model).items()}
        share_tables(layers)
        swap(model, layers)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: object) -> nn.Module:
        model.num_parameters = MethodType(num_parameters, model)
        return model.requires_grad_(False)  # else a forward pass outside no_grad would keep every decoded weight

    def remove_quantization_config(self, model: nn.Module) -> None:
        """For a model whose layers are packed no more."""
        super().remove_quantization_config(model)
        vars(model).pop("num_parameters", None)

    def _dequantize(self, model: nn.Module, **kwargs: object) -> nn.Module:
        raise NotImplementedError(
            "a packed model is not unpacked in place: lcqat_min.pack.export_dense(model, folder) "
            "writes plain weights, load_packed(folder, trainable=True) gives layers to train"
        )

    def is_serializable(self) -> bool:
        get_logger(__name__).warning("a packed model is saved by lcqat_min.pack.save_packed(model, folder)")
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """What transformers counts, and the packed weights, which are buffers."""
    packed = (layer for layer in model.modules() if isinstance(layer, PackedLinear) and not only_trainable)
    return type(model).num_parameters(model, only_trainable, exclude_embeddings) + sum(
        layer.in_features * layer.out_features for layer in packed
    )


def _shared(forms: dict[str, Form], model: nn.Module) -> dict[str, Form]:
    """The layers that `model` has, too, by its own names: those of a model with a head have one prefix more."""
    prefix = f"{model.base_model_prefix}."
    has = {name for name, _ in model.named_modules()}
    names = {name: own for name in forms for own in (prefix + name, name.removeprefix(prefix), name) if own in has}
    if not names or any(form.owner and form.owner not in names for name, form in forms.items() if name in names):
        raise UsageError(
            f"{type(model).__name__} lacks layers of the packed model, as {next(iter(forms))!r}: load it "
            "with the class that config.json names under `architectures`"
        )
    return {own: replace(forms[name], owner=names.get(forms[name].owner, "")) for name, own in names.items()}
