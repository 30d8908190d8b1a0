"""Files of a trained model: packed (small, reloads to the same logits) and dense (ordinary, loads anywhere).

    save_packed(model, folder)               packed codes; all else as it is in the model
    load_packed(folder)                      the model with PackedLinear layers, for inference
    load_packed(folder, trainable=True)      the same map with trainable layers: training continues from here
    export_dense(model, folder)              plain weights, for tools that do not know this package

A packed folder is a Hugging Face folder: config.json with a `quantization_config`, model.safetensors (several files for
a large model) and a README.md that says how to load it. The configuration declares the PackedSpec of each layer, and
the files are compared with it before any tensor is loaded (packing/format.py). Tied embeddings are stored once and tied
again.

Scales and codebooks are stored as fp16. `to_storage_precision(model)` gives the model in memory the same
numbers, so that it, the packed file and the dense export agree. Latents are not stored: further training
starts on the codes (packing/convert.py).

A folder is replaced whole or not at all, and files in it that are not the model's are kept (packing/atomic_save.py).
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ptq.model import QUANT_METHOD, mark
from .atomic_save import write_folder
from .convert import pack_layers, unpack_layers
from .format import VERSION, config_of, declared_specs
from .layer import PackedLinear
from .size import Bits, bits_per_weight

README = """
    import lcqat_min.hf  # without it transformers reports an unknown type and wrong shapes
    from transformers import {kind}
    model = {kind}.from_pretrained("this folder"{trust})

```
{bits}
```
"""


def save_packed(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> Bits:
    """Write `model` (a transformers model, in training or packed) to `folder`; returns the size of what is stored.

    dtype: of what is not quantized (embeddings, norms, biases); by default as it is in the model. The dtype of the
    original is a good choice: embeddings in fp32 can take more space than all codes.

    The model is not changed. A model that is in the folder is replaced; files that are neither its weights nor its
    configuration (a tokenizer, checkpoints) are kept. Code that came with the model is saved beside it, and so are the
    files of a processor (images, sound, chats), if the folder has none. The tokenizer is not.

    Before anything is written, ValueError for a model without quantized layers, with tensors that its configuration
    does not build or that are offloaded, or with an untied head; for numbers that fp16 or dtype cannot hold; for a
    folder of something else, or one that another process saves to. TypeError for a model that is not of transformers.
    """
    if dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
        raise UsageError(f"save_packed: dtype is {dtype}; give torch.bfloat16, torch.float16 or torch.float32")
    model, plain, tensors, layers = _parts(model)
    bits = bits_per_weight(model, dtype)
    if dtype is not None:
        tensors |= {key: _cast(key, tensors[key], dtype) for key, _ in model.named_parameters() if key in tensors}
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": value for key, value in layer.named_buffers()}
    specs = {name: asdict(layer.spec) for name, layer in layers.items()}
    plain.config.quantization_config = {"quant_method": QUANT_METHOD, "version": VERSION, "layers": specs}
    plain.config.dtype = dtype or model.dtype
    trust = ", trust_remote_code=True" if model._auto_class else ""
    readme = README.format(kind=model._auto_class or type(model).__name__, trust=trust, bits=bits)
    write_folder(plain, tensors, Path(folder), readme)
    return bits


def load_packed(folder: str | Path, trainable: bool = False) -> nn.Module:
    """The model of a folder that `save_packed` wrote, in evaluation mode, on the CPU.

    trainable: with layers that continue training from the file's codes, instead of packed ones. OSError for a folder
    that is missing or cannot be read; ValueError for one that is not packed, of another version or damaged, and for a
    model whose code is not part of transformers.
    """
    from . import hf  # noqa: F401  registers the reader

    folder = Path(folder).expanduser()
    config = config_of(folder)
    declared_specs(config.get("quantization_config") or {}, folder)
    model = _class_of(config, folder).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if trainable:
        model.requires_grad_(True)
        packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
        for name, layer in unpack_layers(packed).items():
            model.set_submodule(name, layer)
        model.hf_quantizer.remove_quantization_config(model)
        mark(model)
    return model


def _class_of(config: dict, folder: Path) -> type:
    """The class of transformers that was saved in `folder`; ValueError for one of another origin."""
    import transformers

    name = (config.get("architectures") or ["AutoModelForCausalLM"])[0]
    files = [folder / f"{str(target).partition('.')[0]}.py" for target in (config.get("auto_map") or {}).values()]
    if not hasattr(transformers, name) or any(file.is_file() for file in files):
        raise UsageError(
            f"the code of {name} is not part of transformers, and load_packed runs no other code: if you trust it, "
            f"import lcqat_min.hf and load {folder} with trust_remote_code=True, by the class that its README.md names"
        )
    return getattr(transformers, name)


@torch.no_grad()
def export_dense(model: nn.Module, folder: str | Path) -> None:
    """Write `model` as an ordinary checkpoint of its architecture, in the dtype of its embeddings.

    It is as large as before quantization. It gives the logits of the packed file if that dtype is fp32; a narrower
    one rounds the weights once more. Errors as in save_packed.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model, plain, tensors, layers = _parts(model)
    for name, layer in layers.items():
        weight = unpack_layers({name: layer})[name].weight.to(model.dtype)
        # Conv1D stores the transpose.
        tensors[f"{name}.weight"] = weight if isinstance(plain.get_submodule(name), nn.Linear) else weight.T
    plain.config.dtype = model.dtype
    # Some architectures are renamed or fused while they are loaded: write what their published checkpoints hold.
    write_folder(plain, revert_weight_conversion(plain, tensors), Path(folder))


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module, dict[str, Tensor], dict[str, PackedLinear]]:
    """The model, out of torch.compile's wrapper; the same unquantized, without numbers, as a loader builds it; tensors
    that are not of quantized layers (embeddings, norms, biases, ...), tied ones once; packed layers."""
    from transformers import PreTrainedModel

    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} is not a transformers model: save what pack_layers(model) returns")
    layers, state, tied = pack_layers(model), model.state_dict(), model.all_tied_weights_keys
    if not layers:
        raise UsageError("the model has no quantized layer: call quantize first, or use model.save_pretrained")
    if away := [key for key, value in state.items() if value.is_meta]:
        raise UsageError(f"{away[0]!r} is not in memory (meta device, or offloaded): load the model without device_map")
    for key, source in tied.items():
        if key in state and source in state and state[key].data_ptr() != state[source].data_ptr():
            raise UsageError(
                f"{key!r} has a weight of its own, but the configuration says that it is tied: set "
                "model.config.tie_word_embeddings = False and call model.tie_weights(), or tie it again"
            )
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for key in ("quantization_config", "transformers_weights"):  # the latter names a file of the original
        vars(config).pop(key, None)
    with torch.device("meta"):
        plain = type(model)(config)
    plain.generation_config = getattr(model, "generation_config", None)
    built = plain.state_dict()
    kept = {key: state[key] for key in state if key.rpartition(".")[0] not in layers or key.endswith(".bias")}
    expected = {key: value.shape for key, value in built.items() if key.removesuffix(".weight") not in layers}
    found = {key: value.shape for key, value in kept.items()}
    found |= {name: torch.Size() for name in layers if f"{name}.weight" not in built}
    if strange := sorted(key for key, _ in expected.items() ^ found.items() if key not in tied):
        raise UsageError(
            f"the model has other tensors than its configuration builds, {strange[0]!r} first: loaded again, it "
            "would not be the same. Merge or remove what was added to it (adapters, wrappers)."
        )
    return model, plain, {key: value for key, value in kept.items() if tied.get(key) not in state}, layers


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    largest = value.abs().max().item() if value.is_floating_point() and value.numel() else 0.0
    if torch.finfo(dtype).max < largest < float("inf"):
        raise UsageError(f"{name!r} reaches {largest:g}, more than {dtype} holds: save it in torch.bfloat16 or float32")
    return value.to(dtype) if value.is_floating_point() else value
