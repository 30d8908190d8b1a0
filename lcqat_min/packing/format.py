"""What a packed folder declares of itself, and whether its files are so: compared before any tensor is loaded.

    config.json    {..., "quantization_config": {"quant_method", "version", "layers": {name: PackedSpec}}}

The specs (packing/layer.py) declare the name, dtype and shape of every packed tensor. They are compared with the
headers of the tensor files: that finds a file that is truncated, of another model or of another format.

Limits: a changed number is not found. For files that travel, compare a checksum (sha256sum).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..disk.tensor_file import reading
from ..errors import UsageError
from ..ptq.model import IN_TRAINING, QUANT_METHOD
from .layer import PackedSpec

VERSION = 2
REMEDY = "copy it again from where it was whole, or save the model again"
HEADER_DTYPES = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16"}


def declared_specs(settings: dict, folder: Path) -> dict[str, PackedSpec]:
    """Specs of the packed layers of a folder, by name.

    settings: quantization_config of its config.json. ValueError for those of another method or format version.
    """
    method, version = settings.get("quant_method"), settings.get("version")
    if method != QUANT_METHOD:
        raise UsageError(f"{folder} is not a packed model (quant_method: {method}): load it with transformers")
    if version == IN_TRAINING["version"]:
        remedy = "quantize the original again, load_state_dict the tensors of this folder, and call save_packed"
        raise UsageError(f"{folder} was written by save_pretrained from a model in training: {remedy}")
    if version != VERSION:
        remedy = "quantize again, or use the lcqat_min that wrote it"
        raise UsageError(f"{folder} has format version {version}, not {VERSION}: {remedy}")
    try:
        return {name: PackedSpec(**spec) for name, spec in settings["layers"].items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / 'config.json'} does not describe packed layers ({error!r}): {REMEDY}") from error


def check_tensors(files: Sequence[Path], specs: dict[str, PackedSpec]) -> None:
    """Compare the headers of `files`, all tensor files of a folder, with `specs`.

    ValueError for a tensor that is missing or of another dtype or shape, and for a damaged file; OSError for a file
    that cannot be read.
    """
    from safetensors import safe_open

    found: dict[str, tuple] = {}
    for file in files:
        with reading(file, REMEDY), safe_open(file, framework="pt") as stored:
            slices = ((name, stored.get_slice(name)) for name in stored.keys())
            found |= {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices}
    for layer, spec in specs.items():
        for key, (dtype, shape) in spec.tensors(spec.owner == layer).items():
            want, got = (HEADER_DTYPES[dtype], shape), found.get(f"{layer}.{key}", "missing")
            if got != want:
                raise UsageError(f"tensor {layer}.{key} of {files[0].parent} is {got}, not {want}: {REMEDY}")


def config_of(folder: Path) -> dict:
    """config.json of a folder; OSError if it is missing or cannot be read, ValueError if it is not a configuration."""
    file, before = folder / "config.json", folder.resolve().with_name(f"{folder.name}.before-save")
    interrupted = f"a save was interrupted: rename {before} back"
    with reading(file, interrupted if before.is_dir() else "give a folder that save_packed wrote"):
        return {} | json.loads(file.read_text(encoding="utf-8"))
