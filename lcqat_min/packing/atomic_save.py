"""Write a model's folder whole or not at all: a save that fails, or is killed, loses nothing that was there before.

    1  write everything to <folder>.saving
    2  rename <folder>, if it exists, to <folder>.before-save
    3  rename <folder>.saving to <folder>
    4  move the user's own files from <folder>.before-save to <folder>, and delete the rest

A save that was killed between 2 and 3 leaves no <folder>, but both models whole; the next save renames the old one
back before it begins. After a kill in step 4 the next save finishes the step. A lock keeps other processes away.

The model's own files are MODEL_FILES, code that came with the model, and a README.md that begins with TITLE. All
others are the user's (a tokenizer, a processor, checkpoints, a README.md with another title).

Limits: between steps 2 and 3 a reader finds no folder for a moment. The folder can be neither the current one nor a
mount point, since these cannot be renamed, and its parent must be writable.
"""

import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

from torch import Tensor, nn

from ..disk.whole_file import alone
from ..errors import UsageError

SHARD_SIZE = "5GB"  # of tensors in one file; more are written to several files
TITLE = "# A model packed by lcqat-min"
MODEL_FILES = re.compile(r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def write_folder(model: nn.Module, tensors: dict[str, Tensor], folder: Path, readme: str = "") -> None:
    """Write `tensors` and, from a transformers `model`, its configuration, generation settings and code.

    ValueError, before anything is written, for a file, the current folder or a folder of something else, and while
    another process saves there.
    """
    from huggingface_hub import save_torch_state_dict

    folder = folder.expanduser().resolve()
    saving, before = (folder.with_name(folder.name + end) for end in (".saving", ".before-save"))
    is_new = not folder.exists() or folder.is_dir() and not any(folder.iterdir())
    if folder == Path.cwd() or not is_new and not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is the current folder, or has no config.json of a model: give a new or empty one")
    with alone(saving):
        _clear_up(folder, saving, before)
        try:
            saving.mkdir()
            _write_description(model, saving)
            save_torch_state_dict(tensors, saving, max_shard_size=SHARD_SIZE)
            for file in saving.glob("*.safetensors"):  # nobody else could read it (disk/tensor_file.py)
                file.chmod((saving / "config.json").stat().st_mode)
            if readme:
                (saving / "README.md").write_text(f"{TITLE}\n{readme}", encoding="utf-8")
            if folder.exists():
                folder.rename(before)
            saving.rename(folder)
        finally:
            _clear_up(folder, saving, before)


def _clear_up(folder: Path, saving: Path, before: Path) -> None:
    """If a replacement of `folder` was begun, finish it or, if the new model is not in its place, undo it."""
    if before.is_dir():
        with suppress(OSError):
            folder.rmdir()  # only an empty one, which was made after a save was killed
        if not folder.exists():
            before.rename(folder)
        else:
            for file in before.iterdir():
                new = folder / file.name
                if _is_users(file) and (file.is_dir() or not new.exists() or not _is_users(new)):
                    file.replace(new)
            shutil.rmtree(before, ignore_errors=True)
    shutil.rmtree(saving, ignore_errors=True)


def _is_users(file: Path) -> bool:
    if file.name == "README.md":
        return not file.read_text(encoding="utf-8", errors="replace").startswith(TITLE)
    return not MODEL_FILES.fullmatch(file.name)


def _write_description(model: nn.Module, saving: Path) -> None:
    """Code, configuration and generation settings."""
    from transformers.dynamic_module_utils import custom_object_save

    for own in (model, config := model.config):
        if own._auto_class is not None:
            custom_object_save(own, saving, config)
    config.to_json_file(saving / "config.json")  # save_pretrained refuses some settings, at the cost of the weights
    file, settings = saving / "generation_config.json", model.generation_config
    try:
        if settings is not None:
            settings.to_json_file(file)
            type(settings).from_pretrained(saving)
    except Exception as error:  # of any kind: with this file the model would not load
        file.unlink(missing_ok=True)
        warnings.warn(f"generation_config is not saved ({error}): correct it and save it yourself", stacklevel=2)
