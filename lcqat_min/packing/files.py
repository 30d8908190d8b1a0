"""Files of a trained model: packed (small, reloads to the same logits) and dense (ordinary, loads anywhere).

    save_packed(model, folder)               codes as bytes, all else as it is in the model
    load_packed(folder)                      the model with PackedLinear layers, for inference
    load_packed(folder, trainable=True)      the same map with trainable layers: training goes on from here
    export_dense(model, folder)              plain weights, for tools that have never heard of this package

A packed folder is a Hugging Face folder: config.json with a `quantization_config`, model.safetensors (several
files where there is much) and a README.md that says how to load it. The configuration declares each layer's Form,
and all is compared with it before any tensor is loaded (packing/format.py). Tied embeddings are stored once and tied
again.

Scales and codebooks are stored as fp16. `to_storage_precision(model)` gives the model in memory the same
numbers, so that it, the packed file and the dense export agree. Latents are not stored: further training
starts on the codes (packing/convert.py).

A folder is replaced whole or not at all, and files in it that are not the model's are left alone
(packing/atomic_save.py).
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ptq.model import METHOD, mark
from .atomic_save import TITLE, write_folder
from .convert import pack_layers, to_storage_precision, unpack_layers
from .format import VERSION, check, config_of, configure, digest, tensor_files
from .layer import PackedLinear
from .size import Bits, CodeStats, bits_per_weight, code_stats, codes_of

__all__ = [
    "Bits",
    "CodeStats",
    "PackedLinear",
    "bits_per_weight",
    "code_stats",
    "codes_of",
    "export_dense",
    "load_packed",
    "save_packed",
    "to_storage_precision",
]

README = """

    import lcqat_min.hf                                   # teaches transformers to read this folder
    from transformers import {kind}
    model = {kind}.from_pretrained("this folder"{trust})

Without the first line transformers reports an unknown quantization type `lcqat_min.hf` and stops at
weights of another shape than it expects.

"""


def save_packed(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> Bits:
    """Write `model` (a transformers model, in training or packed) to `folder`; returns what it takes.

    dtype: of what is not quantized (embeddings, norms, biases); as it is in the model where none is given. The
    original's is a good choice: embeddings in fp32 can take more than all codes.

    The model is not changed. A model that is in the folder is replaced; files that are neither its weights nor its
    configuration (a tokenizer, checkpoints) are left alone. ValueError, before anything is written, for a model
    without quantized layers, with tensors that its configuration does not build or that are offloaded, or with an
    untied head; for numbers that fp16 or dtype cannot hold; for a folder of something else, or one that another process
    saves to. TypeError for a model that is not of transformers.

    Code that came with the model is saved beside it, and so are, where the folder has none, the files of a processor
    (images, sound, chats) from where the model was loaded. The tokenizer is not.
    """
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        raise UsageError(f"save_packed: dtype is {dtype}; give torch.bfloat16, torch.float16 or torch.float32")
    model, tensors, layers, _ = _parts(model)
    if dtype is not None:
        parameters = {name for name, _ in model.named_parameters()}
        tensors = {key: _cast(key, value, dtype) if key in parameters else value for key, value in tensors.items()}
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": getattr(layer, key) for key in layer.form.tensors(name)}
    forms = {name: asdict(layer.form) for name, layer in layers.items()}
    bits = bits_per_weight(model, dtype)

    def complete(part: Path) -> None:
        configure(
            part,
            {"quant_method": METHOD, "version": VERSION, "layers": forms, "sha256": digest(forms, tensor_files(part))},
        )
        (part / "README.md").write_text(f"{TITLE}{_readme(model)}```\n{bits}\n```\n", encoding="utf-8")

    write_folder(model, tensors, Path(folder), dtype or model.dtype, complete)
    return bits


def load_packed(folder: str | Path, trainable: bool = False) -> nn.Module:
    """The model of a folder that `save_packed` wrote, in evaluation mode, on the CPU.

    trainable: with layers that train on from the file's codes instead of packed ones. OSError for a folder that is
    missing or cannot be read; ValueError for one that is foreign, of a newer version, truncated or altered, and for a
    model whose code is not part of transformers.
    """

    from . import hf  # noqa: F401  registers the reader

    folder = Path(folder).expanduser()
    config = config_of(folder)
    check(tensor_files(folder), config.get("quantization_config") or {})
    model = _class_of(folder, config).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if trainable:
        model.requires_grad_(True)
        swap(model, unpack_layers({n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}))
        model.hf_quantizer.remove_quantization_config(model)
        mark(model)
    return model


def _readme(model: nn.Module) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if model._auto_class is not None:
        return README.format(kind=model._auto_class, trust=", trust_remote_code=True")
    name = type(model).__name__
    return README.format(kind="AutoModelForCausalLM" if name in CAUSAL.values() else name, trust="")


def _class_of(folder: Path, config: dict) -> type:
    """The class of transformers that was saved in `folder`; ValueError for one of another origin."""
    import transformers

    name = str((config.get("architectures") or ["AutoModelForCausalLM"])[0])
    coded = {key: str(value).rpartition(".") for key, value in (config.get("auto_map") or {}).items()}
    autos = [key for key, (file, _, kind) in coded.items() if kind == name and (folder / f"{file}.py").is_file()]
    if autos or not hasattr(transformers, name):
        how = (
            f"{autos[0]}.from_pretrained({str(folder)!r}, trust_remote_code=True)"
            if autos
            else (f"{name}.from_pretrained({str(folder)!r})")
        )
        raise UsageError(
            f"the code of {name} is not part of transformers, and load_packed runs no other. If you trust "
            f"it: import lcqat_min.hf, then {how}"
        )
    return getattr(transformers, name)


@torch.no_grad()
def export_dense(model: nn.Module, folder: str | Path) -> None:
    """Write `model` as an ordinary checkpoint of its architecture, in the dtype of its embeddings.

    It is as large as before quantization. It gives the logits of the packed file where that dtype is fp32; a narrower
    one rounds the weights once more. Errors as in save_packed.
    """
    model, tensors, layers, plain = _parts(model)
    for name, layer in layers.items():
        weight = unpack_layers({name: layer})[name].weight.to(model.dtype)
        is_linear = isinstance(plain.get_submodule(name), nn.Linear)  # Conv1D stores the transpose
        tensors[f"{name}.weight"] = weight if is_linear else weight.T
    tensors = _as_published(plain, tensors)
    write_folder(model, tensors, Path(folder), model.dtype, lambda part: configure(part, None))


def _as_published(plain: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named and split as in the architecture's own checkpoints: transformers renames or fuses some while it loads."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return tensors  # transformers reads its own names, too
    return revert_weight_conversion(plain, tensors)


def swap(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Put `layers` (by name) in the place of the model's."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def _parts(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor], dict[str, PackedLinear], nn.Module]:
    """The model itself (out of torch.compile's wrapper); tensors that stay as they are (embeddings, norms, biases,
    ...), tied ones once; packed layers; and the model unquantized, without numbers, as a loader builds it."""
    from transformers import PreTrainedModel

    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is no transformers model and has no config to load it by. "
            "Save what lcqat_min.storage.pack_layers(model) gives by your own means."
        )
    layers = pack_layers(model)
    if not layers:
        raise UsageError(
            "the model has no quantized layer: call quantize first, or save it as it is by model.save_pretrained"
        )
    rest, state = {}, model.state_dict()
    if away := [key for key, value in state.items() if value.is_meta]:
        raise UsageError(
            f"{away[0]!r} is not in memory (meta device, or offloaded): load the model whole, without device_map"
        )
    for key, value in state.items():
        parent, _, leaf = key.rpartition(".")
        partner = state.get(model.all_tied_weights_keys.get(key))
        if partner is not None and partner.data_ptr() != value.data_ptr():
            raise UsageError(
                f"{key!r} has a weight of its own, but the configuration says that it is tied: set "
                "model.config.tie_word_embeddings = False and call model.tie_weights(), or tie it again"
            )
        if partner is None and (parent not in layers or leaf == "bias"):
            rest[key] = value
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    built = {key: value.shape for key, value in plain.state_dict().items()}
    saved = {key: value.shape for key, value in rest.items()}
    saved |= {key: built.get(key, ()) for key in (f"{name}.weight" for name in layers)}
    differ = {key for key in built.keys() | saved.keys() if built.get(key) != saved.get(key)}
    if strange := sorted(differ - set(model.all_tied_weights_keys)):
        raise UsageError(
            f"the model has other tensors than its configuration builds, {strange[0]!r} first: loaded "
            "again, it would not be the same. Merge or remove what was added to it (adapters, wrappers)."
        )
    return model, rest, layers, plain


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    largest = value.abs().max().item() if value.numel() else 0.0
    if torch.finfo(dtype).max < largest < float("inf"):
        raise UsageError(
            f"{name!r} reaches {largest:g}, more than {dtype} holds: save it in torch.bfloat16 or torch.float32"
        )
    return value.to(dtype)
