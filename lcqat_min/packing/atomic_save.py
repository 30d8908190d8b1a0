"""Write a model's folder whole or not at all: a save that fails, or is killed, costs no older model.

Files are written in folder/SAVING and then renamed into the folder, where config.json is the switch: without it nothing
loads, so it is the first to go and the last to come. What is replaced lies in folder/BEFORE meanwhile. The next save
begins by clearing up after one that was killed: it finishes what was switched already, and undoes the rest.

Only a model's own files are touched: its weights, its configuration, code that came with it and a README.md that begins
with TITLE. Files that prepare its inputs (PROCESSOR) are added where the folder has none.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..disk.locks import alone
from ..disk.tensor_file import save_tensors
from ..errors import UsageError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # says which of several files holds which tensor
SHARD = "5GB"  # of tensors in a file; more are written as several files
SAVING, BEFORE, MOVED = ".saving", ".before-save", ".moved-out"
TITLE = "# A model packed by lcqat-min"
PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def write_folder(
    model: nn.Module, tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype, complete: Callable[[Path], None]
) -> None:
    """Write configuration and `tensors` of a transformers model; `complete` may add files and change them.

    dtype: to load it in. complete(part): part is where they lie before they are moved in. ValueError, before
    anything is written, for a file or a folder of something else, and while another process saves there.
    """
    folder = folder.expanduser().resolve()
    is_model = (folder / "config.json").is_file() or (folder / BEFORE).is_dir()
    if (
        folder.is_file()
        or folder.is_dir()
        and not is_model
        and any(not file.name.startswith(SAVING) for file in folder.iterdir())
    ):
        raise UsageError(f"{folder} is no folder of a model (no config.json): give a new or an empty one")
    is_new = not folder.exists()
    try:
        with alone(folder / SAVING):
            _clear_up(folder)
            part = folder / SAVING
            part.mkdir()
            try:
                _write_description(model, part, dtype)
                _copy_processor(model, part, folder)
                _write_tensors(tensors, part)
                complete(part)
                _move_in(part, folder)
            finally:
                _clear_up(folder)
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _write_description(model: nn.Module, part: Path, dtype: torch.dtype) -> None:
    """Configuration, generation settings and code, if it came with the model: as save_pretrained writes them, but
    settings that it refuses to write are written as they are. They must not cost the weights."""
    from transformers.dynamic_module_utils import custom_object_save

    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.__dict__.pop("transformers_weights", None)  # another name of the original's file
    for own in (model, config):
        if getattr(own, "_auto_class", None) is not None:
            custom_object_save(own, part, config)
    config.to_json_file(part / "config.json")
    if (settings := getattr(model, "generation_config", None)) is not None:
        try:
            settings.to_json_file(part / "generation_config.json")
            type(settings).from_pretrained(part)
        except Exception as error:  # of whatever kind: with this file the model would not load
            (part / "generation_config.json").unlink(missing_ok=True)
            warnings.warn(
                f"model.generation_config is not saved, as it could not be read again ({error}): mend it and "
                "call its save_pretrained",
                stacklevel=2,
            )


def _copy_processor(model: nn.Module, part: Path, folder: Path) -> None:
    """Copy what prepares images, sound and chats from where the model was loaded, as far as `folder` lacks it."""
    from huggingface_hub import try_to_load_from_cache

    origin = model.config.name_or_path
    for name in PROCESSOR if origin else ():
        try:
            found = Path(origin) / name
            if not Path(origin).is_dir():
                found = try_to_load_from_cache(origin, name, revision=getattr(model.config, "_commit_hash", None))
            if isinstance(found, (str, Path)) and Path(found).is_file() and not (folder / name).exists():
                shutil.copyfile(found, part / name)
        except ValueError:  # neither a folder that is still there nor a name of the hub
            return
        except OSError as error:
            warnings.warn(f"{name} of {origin} is not saved beside the model ({error}): copy it", stacklevel=2)


def _write_tensors(tensors: dict[str, Tensor], part: Path) -> None:
    """Write one file, or several and their index where it would exceed SHARD; on the CPU is one at a time."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD
    )
    for name, keys in split.filename_to_tensors.items():
        save_tensors({key: tensors[key] for key in keys}, part / name, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (part / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move_in(part: Path, folder: Path) -> None:
    """Rename the files of `part` into `folder`, and what they replace into folder/BEFORE."""
    readme = folder / "README.md"
    if readme.is_file() and not _is_ours(readme):
        (part / "README.md").unlink(missing_ok=True)
    new = [file.name for file in part.iterdir() if file.suffix != ".lock"]  # Windows keeps those of disk/locks.py
    ours = {*new, *_weight_files(folder), *(["README.md"] if _is_ours(readme) else [])}
    (folder / BEFORE).mkdir()
    for name in sorted(ours, key=_config_last, reverse=True):
        if (folder / name).is_file():
            os.replace(folder / name, folder / BEFORE / name)
    (part / MOVED).write_text(json.dumps(new), encoding="utf-8")
    for name in sorted(new, key=_config_last):
        os.replace(part / name, folder / name)


def _clear_up(folder: Path) -> None:
    """Remove what a save leaves, whether it came to its end or not. Once all was moved out and a config.json is in its
    place, all else is, too; short of that, what was moved in goes and what was moved out comes back."""
    before, part = folder / BEFORE, folder / SAVING
    moved = part / MOVED
    if before.is_dir() and moved.is_file() and (folder / "config.json").is_file():
        os.replace(before, part / BEFORE)
    elif before.is_dir():
        for name in json.loads(moved.read_text(encoding="utf-8")) if moved.is_file() else ():
            (folder / name).unlink(missing_ok=True)
        moved.unlink(missing_ok=True)  # from here on the files of these names are the old ones
        for file in sorted(before.iterdir(), key=lambda file: _config_last(file.name)):
            os.replace(file, folder / file.name)
        before.rmdir()
    shutil.rmtree(part, ignore_errors=True)


def _config_last(name: str) -> tuple[bool, str]:
    return name == "config.json", name


def _weight_files(folder: Path) -> set[str]:
    """Names of the weights of the model in `folder`; other tensor files (adapters, checkpoints) are not ours."""
    return {WEIGHTS, INDEX, *(file.name for file in folder.glob("model-?????-of-?????.safetensors"))}


def _is_ours(readme: Path) -> bool:
    return readme.is_file() and readme.read_text(encoding="utf-8", errors="replace").startswith(TITLE)
