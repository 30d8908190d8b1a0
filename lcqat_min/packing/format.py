"""What a packed folder declares of itself, and whether its files are so: compared before any tensor is loaded.

    config.json    {..., "quantization_config": {"quant_method", "version", "layers": {name: Form}, "sha256"}}

All shapes follow from the forms (packing/layer.py). The SHA-256 is over the tensor files, one after the other, and the
forms.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..disk.tensor_file import reading
from ..errors import UsageError
from ..ptq.model import IN_TRAINING, METHOD
from .atomic_save import BEFORE, INDEX, WEIGHTS
from .layer import Form

VERSION = 1
AGAIN = "copy it again from where it was whole, or save the model again"


def check(files: Sequence[Path], settings: dict) -> dict[str, Form]:
    """Forms of the layers packed in `files`; ValueError where these are not as their `settings` declare.

    files: model.safetensors, or all shards. settings: quantization_config of config.json beside them. OSError for a
    file that is missing or cannot be read.
    """
    folder = files[0].parent
    if settings.get("quant_method") != METHOD:
        raise UsageError(
            f"{folder} is no packed model of lcqat_min (quant_method: {settings.get('quant_method')}). "
            "Load it with transformers, or give a folder that save_packed wrote."
        )
    if settings.get("version") == IN_TRAINING["version"]:
        raise UsageError(
            f"{folder} was written by save_pretrained from a model in training (or loaded with the "
            "config of one): transformers cannot build that. Quantize the original again with the same "
            f"settings, load_state_dict the tensors in {folder}, and save_packed that."
        )
    if settings.get("version") != VERSION:
        raise UsageError(
            f"{folder} has format version {settings.get('version')}, this lcqat_min reads "
            f"version {VERSION}: update lcqat_min"
        )
    try:
        forms = {name: Form(**form) for name, form in settings["layers"].items()}
        layouts = {name: form.tensors(name) for name, form in forms.items()}
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UsageError(f"{folder / 'config.json'} describes no layers ({error!r}): {AGAIN}") from error
    what, found = files[0] if len(files) == 1 else folder, _tensors_in(files)
    for layer, key in ((layer, key) for layer, layout in layouts.items() for key in layout):
        dtype, shape = layouts[layer][key]
        want, got = ("U8" if dtype == torch.uint8 else "F16", shape), found.get(f"{layer}.{key}", "missing")
        if got != want:
            raise UsageError(f"tensor {layer}.{key} of {what} is {got}, not {want}: {AGAIN}")
    if settings.get("sha256") != digest(settings["layers"], files):
        raise UsageError(f"{what} or its config.json was altered since it was saved (SHA-256): {AGAIN}")
    return forms


def _tensors_in(files: Sequence[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every tensor in `files`."""
    from safetensors import safe_open

    found = {}
    for file in files:
        with reading(file, AGAIN), safe_open(file, framework="pt") as stored:
            for name in stored.keys():
                part = stored.get_slice(name)
                found[name] = part.get_dtype(), tuple(part.get_shape())
    return found


def digest(forms: dict[str, dict], files: Sequence[Path]) -> str:
    """SHA-256 over the files, in the order of their names, and the forms."""
    found = hashlib.sha256()
    for file in sorted(files):
        with open(file, "rb") as stream:
            hashlib.file_digest(stream, lambda: found)
    found.update(json.dumps(forms, sort_keys=True).encode())
    return found.hexdigest()


def config_of(folder: Path) -> dict:
    """config.json of a folder; OSError where it is missing or cannot be read, ValueError where it is none."""
    before, file = folder / BEFORE, folder / "config.json"
    hint = f"; a save was interrupted: save again, or move the files in {before} back" if os.path.isdir(before) else ""
    try:
        config = json.loads(_text(file, f"give a folder that save_packed wrote{hint}"))
        dict(config.get("quantization_config") or {})
        return config
    except (ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"{file} is not the JSON of a configuration ({error}): {AGAIN}") from error


def configure(folder: Path, settings: dict | None) -> None:
    """Set or remove the quantization_config of folder/config.json."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config |= {} if settings is None else {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tensor_files(folder: Path) -> list[Path]:
    """The file that holds the tensors of a folder, or all of several, whether they are there or not."""
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        return [folder / WEIGHTS]
    try:
        return sorted({folder / str(name) for name in json.loads(_text(index, AGAIN))["weight_map"].values()})
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise UsageError(f"{index} does not say where the tensors are ({error!r}): {AGAIN}") from error


def _text(file: Path, remedy: str) -> str:
    with reading(file, remedy):
        return file.read_text(encoding="utf-8")
