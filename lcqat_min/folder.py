"""Write a model's folder whole or not at all: a save that fails, or loses power, costs no older model.

Files are written under another name inside the folder and then renamed into it, the configuration last, since without
it nothing loads. What they replace lies in folder/BEFORE meanwhile; a save that was killed on the way leaves it there,
and the next save moves it back first. Only a model's own files are touched: its weights, its configuration and a
README.md that begins with TITLE.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
BEFORE = ".before-save"
TITLE = "# A model packed by lcqat-min"


def write_folder(
    model: nn.Module, tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype, complete: Callable[[Path], None]
) -> None:
    """Write configuration and `tensors` of a transformers model; `complete` may add files and change them.

    dtype: to load it in. complete(part): part is where they lie before they are moved in. ValueError, before
    anything is written, for a file or a folder of something else.
    """
    from safetensors.torch import save_file

    folder = folder.expanduser().resolve()
    is_model = (folder / "config.json").is_file() or (folder / BEFORE).is_dir()
    if folder.is_file() or folder.is_dir() and not is_model and any(folder.iterdir()):
        raise ValueError(f"{folder} is no folder of a model (no config.json): give a new or an empty one")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
            part = Path(name)
            config = copy.deepcopy(model.config)
            config.architectures, config.dtype = [type(model).__name__], dtype
            config.save_pretrained(part)
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(part)
            tensors = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
            save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
            complete(part)
            _move_in(part, folder)
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _move_in(part: Path, folder: Path) -> None:
    """Rename the files of `part` into `folder`, all or none. What they replace lies in folder/BEFORE meanwhile."""
    before = folder / BEFORE
    _undo(folder)  # of a save that was interrupted
    if (folder / "README.md").is_file() and not _is_ours(folder / "README.md"):
        (part / "README.md").unlink(missing_ok=True)
    new = {file.name for file in part.iterdir()}
    old = {name for name in new | _weight_files(folder) if (folder / name).is_file()}
    if _is_ours(folder / "README.md"):
        old.add("README.md")
    before.mkdir()
    try:
        for name in sorted(old):
            os.replace(folder / name, before / name)
        for name in sorted(new, key=lambda name: (name == "config.json", name)):  # last: without it nothing loads
            os.replace(part / name, folder / name)
    except BaseException:
        for name in new - old:
            (folder / name).unlink(missing_ok=True)
        _undo(folder)
        raise
    shutil.rmtree(before)


def _undo(folder: Path) -> None:
    """Move what folder/BEFORE holds back, if it is there."""
    before = folder / BEFORE
    if before.is_dir():
        for file in before.iterdir():
            os.replace(file, folder / file.name)
        before.rmdir()


def _weight_files(folder: Path) -> set[str]:
    """Names of the weights of the model in `folder`; other tensor files (adapters, checkpoints) are not ours."""
    shards = (file.name for file in folder.glob("model-?????-of-?????.safetensors"))
    return {WEIGHTS, f"{WEIGHTS}.index.json", *shards}


def _is_ours(readme: Path) -> bool:
    return readme.is_file() and readme.read_text(encoding="utf-8", errors="replace").startswith(TITLE)
