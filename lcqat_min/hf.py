"""Let transformers read packed folders: after `import lcqat_min.hf`, from_pretrained gives the packed model.

    import lcqat_min.hf
    model = AutoModelForCausalLM.from_pretrained(folder)         # what lcqat_min.pack.save_packed wrote

transformers looks up `quant_method` of config.json in a registry. This file enters two small classes
there, through the public decorators: one holds the settings, the other puts empty PackedLinear layers in
the place of the linear ones, which transformers then fills by name. So generate, pipelines and evaluation
harnesses work as with any other model.

Gives up saving through save_pretrained (it would not renew the digest): use save_packed. No training of
packed layers: load_packed(folder, trainable=True) gives trainable ones.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.logging import get_logger
from transformers.utils.quantization_config import QuantizationConfigMixin

from .pack import METHOD, check, swap
from .packed import PackedLinear, share_tables


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
            raise ValueError("a packed model needs its model.safetensors: give from_pretrained the folder")
        forms = check(Path(checkpoint_files[0]), self.quantization_config.to_dict())
        layers = {name: PackedLinear(form, name) for name, form in forms.items()}
        share_tables(layers)
        swap(model, layers)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: object) -> nn.Module:
        return model.requires_grad_(False)  # else a forward pass outside no_grad would keep every decoded weight

    def is_serializable(self) -> bool:
        get_logger(__name__).warning("a packed model is saved by lcqat_min.pack.save_packed(model, folder)")
        return False

    @property
    def is_trainable(self) -> bool:
        return False
