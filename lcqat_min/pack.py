"""Files of a trained model: packed (small, reloads to the same logits) and dense (ordinary, loads anywhere).

    save_packed(model, folder)               codes as bytes, all else as it is in the model
    load_packed(folder)                      the model with PackedLinear layers, for inference
    load_packed(folder, trainable=True)      the same map with trainable layers: training goes on from here
    export_dense(model, folder)              plain weights, for tools that have never heard of this package

A packed folder is a Hugging Face folder: config.json with a `quantization_config`, model.safetensors and a
README.md that says how to load it. The configuration declares each layer's Form (packed.py). All shapes
follow from the forms; they are compared, and so is a SHA-256 over forms and tensor file, before any tensor
is loaded. Tied embeddings are stored once and tied again.

Scales and codebooks are stored as fp16. `to_storage_precision(model)` gives the model in memory the same
numbers, so that it, the packed file and the dense export agree. Latents are not stored: further training
starts on the codes (storage.py).

A folder is replaced whole or not at all, and files in it that are not the model's are left alone (folder.py).
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from .bits import Bits, CodeStats, bits_per_weight, code_stats, codes_of
from .convert import IN_TRAINING, METHOD, mark
from .folder import BEFORE, TITLE, WEIGHTS, write_folder
from .packed import Form, PackedLinear
from .storage import pack_layers, to_storage_precision, unpack_layers

__all__ = ["Bits", "CodeStats", "PackedLinear", "bits_per_weight", "code_stats", "codes_of", "export_dense",
           "load_packed", "save_packed", "to_storage_precision"]

VERSION = 1
AGAIN = "copy it again from where it was whole, or save the model again"
README = """

    import lcqat_min.hf                                   # teaches transformers to read this folder
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("this folder")

Without the first line transformers reports an unknown quantization type `lcqat_min.hf` and stops at
weights of another shape than it expects.

"""


def save_packed(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> Bits:
    """Write `model` (a transformers model, in training or packed) to `folder`; returns what it takes.

    dtype: of what is not quantized (embeddings, norms, biases); as it is in the model where none is given. The
    original's is a good choice: embeddings in fp32 can take more than all codes.

    The model is not changed. A model that is in the folder is replaced; files that are neither its weights nor its
    configuration (a tokenizer, checkpoints) are left alone. ValueError, before anything is written, for a model
    without quantized layers, with tensors that its configuration does not build, or with an untied head; for numbers
    that fp16 or dtype cannot hold, for a folder of something else; TypeError for a model that is not of transformers.
    """
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"save_packed: dtype is {dtype}; give torch.bfloat16, torch.float16 or torch.float32")
    model, tensors, layers, _ = _parts(model)
    if dtype is not None:
        parameters = {name for name, _ in model.named_parameters()}
        tensors = {key: _cast(key, value, dtype) if key in parameters else value for key, value in tensors.items()}
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": getattr(layer, key) for key in layer.form.tensors(name)}
    forms = {name: asdict(layer.form) for name, layer in layers.items()}
    bits = bits_per_weight(model, dtype)

    def complete(part: Path) -> None:
        _configure(part, {"quant_method": METHOD, "version": VERSION, "layers": forms,
                          "sha256": _digest(forms, part / WEIGHTS)})
        (part / "README.md").write_text(f"{TITLE}{README}```\n{bits}\n```\n", encoding="utf-8")

    write_folder(model, tensors, Path(folder), dtype or model.dtype, complete)
    return bits


def load_packed(folder: str | Path, trainable: bool = False) -> nn.Module:
    """The model of a folder that `save_packed` wrote, in evaluation mode, on the CPU.

    trainable: with layers that train on from the file's codes instead of packed ones. FileNotFoundError or
    ValueError for a folder that is missing, foreign, of a newer version, truncated or altered.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    from . import hf  # noqa: F401  registers the reader

    folder = Path(folder).expanduser()
    config = config_of(folder)
    check(folder / WEIGHTS, config.get("quantization_config") or {})
    kind = getattr(transformers, str((config.get("architectures") or [""])[0]), AutoModelForCausalLM)
    model = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if trainable:
        model.requires_grad_(True)
        swap(model, unpack_layers({n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}))
        model.hf_quantizer.remove_quantization_config(model)
        mark(model)
    return model


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
    write_folder(model, tensors, Path(folder), model.dtype, lambda part: _configure(part, None))


def _as_published(plain: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named and split as in the architecture's own checkpoints: transformers renames or fuses some while it loads."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return tensors  # transformers reads its own names, too
    return revert_weight_conversion(plain, tensors)


def check(file: Path, settings: dict) -> dict[str, Form]:
    """Forms of the layers packed in `file`; ValueError where it is not as its `settings` declare.

    settings: quantization_config of its config.json.
    """
    from safetensors import SafetensorError, safe_open

    if settings.get("quant_method") != METHOD:
        raise ValueError(f"{file.parent} is no packed model of lcqat_min (quant_method: "
                         f"{settings.get('quant_method')}). Load it with transformers, or give a folder that "
                         "save_packed wrote.")
    if settings.get("version") == IN_TRAINING["version"]:
        raise ValueError(f"{file.parent} was written by save_pretrained from a model in training (or loaded with the "
                         "config of one): transformers cannot build that. Quantize the original again with the same "
                         f"settings, load_state_dict the tensors in {file.parent}, and save_packed that.")
    if settings.get("version") != VERSION:
        raise ValueError(f"{file.parent} has format version {settings.get('version')}, this lcqat_min reads "
                         f"version {VERSION}: update lcqat_min")
    try:
        forms = {name: Form(**form) for name, form in settings["layers"].items()}
        layouts = {name: form.tensors(name) for name, form in forms.items()}
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file.parent / 'config.json'} describes no layers ({error!r}): {AGAIN}") from error
    try:
        with safe_open(file, framework="pt") as stored:
            found = {name: stored.get_slice(name) for name in stored.keys()}
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is missing or truncated ({error}): {AGAIN}") from error
    for layer, key in ((layer, key) for layer, layout in layouts.items() for key in layout):
        dtype, shape = layouts[layer][key]
        want, got = ("U8" if dtype == torch.uint8 else "F16", shape), found.get(f"{layer}.{key}", "missing")
        if got != want:
            raise ValueError(f"tensor {layer}.{key} of {file} is {got}, not {want}: {AGAIN}")
    if settings.get("sha256") != _digest(settings["layers"], file):
        raise ValueError(f"{file} or its config.json was altered since it was saved (SHA-256): {AGAIN}")
    return forms


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
        raise TypeError(f"{type(model).__name__} is no transformers model and has no config to load it by. "
                        "Save what lcqat_min.storage.pack_layers(model) gives by your own means.")
    layers = pack_layers(model)
    if not layers:
        raise ValueError("the model has no quantized layer: call quantize first, or save it as it is by "
                         "model.save_pretrained")
    rest, state = {}, model.state_dict()
    for key, value in state.items():
        parent, _, leaf = key.rpartition(".")
        partner = state.get(model.all_tied_weights_keys.get(key))
        if partner is not None and partner.data_ptr() != value.data_ptr():
            raise ValueError(f"{key!r} has a weight of its own, but the configuration says that it is tied: set "
                             "model.config.tie_word_embeddings = False and call model.tie_weights(), or tie it again")
        if partner is None and (parent not in layers or leaf == "bias"):
            rest[key] = value
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    built = {key: value.shape for key, value in plain.state_dict().items()}
    saved = {key: value.shape for key, value in rest.items()}
    saved |= {key: built.get(key, ()) for key in (f"{name}.weight" for name in layers)}
    differ = {key for key in built.keys() | saved.keys() if built.get(key) != saved.get(key)}
    if strange := sorted(differ - set(model.all_tied_weights_keys)):
        raise ValueError(f"the model has other tensors than its configuration builds, {strange[0]!r} first: loaded "
                         "again, it would not be the same. Merge or remove what was added to it (adapters, wrappers).")
    return model, rest, layers, plain


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    largest = value.abs().max().item() if value.numel() else 0.0
    if torch.finfo(dtype).max < largest < float("inf"):
        raise ValueError(f"{name!r} reaches {largest:g}, more than {dtype} holds: save it in torch.bfloat16 or "
                         "torch.float32")
    return value.to(dtype)


def _digest(forms: dict[str, dict], file: Path) -> str:
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    digest.update(json.dumps(forms, sort_keys=True).encode())
    return digest.hexdigest()


def config_of(folder: Path) -> dict:
    """config.json of a folder; FileNotFoundError or ValueError where it is missing or none."""
    file = folder / "config.json"
    if not file.is_file():
        before = folder / BEFORE
        hint = f"; a save was interrupted: move the files in {before} back" if before.is_dir() else ""
        raise FileNotFoundError(f"{file} is missing: give a folder that save_packed wrote{hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        dict(config.get("quantization_config") or {})
        return config
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is not the JSON of a configuration ({error}): {AGAIN}") from error


def _configure(part: Path, settings: dict | None) -> None:
    """Set or remove the quantization_config of part/config.json."""
    config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config |= {} if settings is None else {"quantization_config": settings}
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
