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

import copy
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ptq.model import QUANT_METHOD, mark
from .atomic_save import write_folder
from .convert import pack_layers, unpack_layers, unquantized
from .format import VERSION, config_of, declared_specs
from .layer import PackedLinear
from .size import Bits, bits_per_weight

README = """
    import lcqat_min.hf  # without it transformers reports an unknown type and wrong shapes
    from transformers import {kind}
    model = {kind}.from_pretrained("this folder"{trust})

    {bits}
"""


def save_packed(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> Bits:
    """Write `model` (a transformers model, in training or packed) to `folder`; returns the size of what is stored.

    dtype: of what is not quantized (embeddings, norms, biases); by default as it is in the model. The dtype of the
    original is a good choice: embeddings in fp32 can take more space than all codes.

    The model is not changed. A model that is in the folder is replaced; files that are neither its weights nor its
    configuration (a tokenizer, checkpoints) are kept. Code that came with the model is saved beside it; its tokenizer
    and its processor (images, sound, chats) are not: their own save_pretrained adds them.

    Before anything is written, ValueError for a model without quantized layers, with tensors that its configuration
    does not build or that are offloaded, or with an untied head; for numbers that fp16 or dtype cannot hold; for a
    folder of something else, or one that another process saves to. TypeError for a model that is not of transformers.
    """
    if dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
        raise UsageError(f"save_packed: dtype is {dtype}; give torch.bfloat16, torch.float16 or torch.float32")
    model, plain, tensors, layers = _parts(model)
    bits = bits_per_weight(model, dtype)
    for key, value in tensors.items():
        if dtype and isinstance(value, nn.Parameter) and value.is_floating_point():
            tensors[key] = value.to(dtype)
            if tensors[key].isinf().any():
                raise UsageError(f"{key!r} reaches {value.abs().max():g}, too much for {dtype}: give torch.bfloat16")
    tensors |= {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.named_buffers()}
    specs = {name: asdict(layer.spec) for name, layer in layers.items()}
    plain.config.quantization_config = {"quant_method": QUANT_METHOD, "version": VERSION, "layers": specs}
    plain.config.dtype = dtype or model.dtype
    own = model._auto_class  # of a model that came with its code
    kind, trust = (own, ", trust_remote_code=True") if own else (type(model).__name__, "")
    readme = README.format(kind=kind, trust=trust, bits=str(bits).replace("\n", "\n    "))
    write_folder(plain, tensors, Path(folder), readme)
    return bits


def load_packed(folder: str | Path, trainable: bool = False) -> nn.Module:
    """The model of a folder that `save_packed` wrote, in evaluation mode, on the CPU.

    trainable: with layers that continue training from the file's codes, instead of packed ones. OSError for a folder
    that is missing or cannot be read; ValueError for one that is not packed, of another version or damaged, and for a
    model whose code is not part of transformers.
    """
    import transformers

    from . import hf  # noqa: F401  registers the reader

    folder = Path(folder).expanduser()
    config = config_of(folder)
    declared_specs(config.get("quantization_config") or {}, folder)
    kind = (config.get("architectures") or ["AutoModelForCausalLM"])[0]
    if not hasattr(transformers, kind) or "auto_map" in config:
        remedy = f"if you trust it, import lcqat_min.hf and load {folder} as its README.md says"
        raise UsageError(f"the code of {kind} is not part of transformers: {remedy}")
    model = getattr(transformers, kind).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if trainable:
        model.requires_grad_(True)
        for name, layer in unpack_layers(model).items():
            model.set_submodule(name, layer)
        model.hf_quantizer.remove_quantization_config(model)
        mark(model)
    return model


@torch.no_grad()
def export_dense(model: nn.Module, folder: str | Path) -> None:
    """Write `model` as an ordinary checkpoint of its architecture, in the dtype of its embeddings.

    It is as large as before quantization. It gives the logits of the packed file if that dtype is fp32; a narrower
    one rounds the weights once more. Errors as in save_packed.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model, plain, tensors, layers = _parts(model)
    for name, layer in layers.items():
        weight = unpack_layers(layer)[""].weight.to(model.dtype)
        # Conv1D stores the transpose.
        tensors[f"{name}.weight"] = weight if isinstance(plain.get_submodule(name), nn.Linear) else weight.T
    # Some architectures are renamed or fused while they are loaded: write what their published checkpoints hold.
    published = revert_weight_conversion(plain, dict(tensors))
    whole = {key: value if key in tensors else value.clone() for key, value in published.items()}  # no slices
    write_folder(plain, whole, Path(folder))


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module, dict[str, Tensor], dict[str, PackedLinear]]:
    """The model, out of torch.compile's wrapper; the same unquantized, without numbers, as a loader builds it; tensors
    that are not of quantized layers (embeddings, norms, biases, ...), tied ones once; packed layers."""
    from transformers import PreTrainedModel

    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} is not a transformers model: save what pack_layers(model) returns")
    if not (layers := pack_layers(model)):
        raise UsageError("the model has no quantized layer: call quantize first, or use model.save_pretrained")
    tensors = unquantized(model, layers)
    if away := [key for key, value in tensors.items() if value.is_meta]:
        raise UsageError(f"{away[0]!r} is not in memory (meta device, or offloaded): load the model without device_map")
    tied = {key: source for key, source in model.all_tied_weights_keys.items() if {key, source} <= tensors.keys()}
    if untied := [key for key, source in tied.items() if tensors[key] is not tensors[source]]:
        raise UsageError(f"{untied[0]!r} is not tied: do that, or set tie_word_embeddings = False in the configuration")
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for key in ("quantization_config", "transformers_weights", "auto_map"):  # of the original's files
        vars(config).pop(key, None)
    with torch.device("meta"):
        plain = type(model)(config)
    plain.generation_config = getattr(model, "generation_config", None)
    built = {key: value.shape for key, value in plain.state_dict().items()}
    found = {key: value.shape for key, value in tensors.items()}
    found |= {key: built.get(key) for key in (f"{name}.weight" for name in layers)}
    if strange := sorted(key for key, _ in built.items() ^ found.items()):
        raise UsageError(f"{strange[0]!r} is not as the configuration builds it: merge or remove what was added")
    return model, plain, {key: value for key, value in tensors.items() if key not in tied}, layers
