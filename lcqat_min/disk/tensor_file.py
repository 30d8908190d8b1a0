"""A file of tensors: written whole or not at all, and what is wrong with one said precisely.

safetensors (0.8) writes under a random name beside the file and renames that. By itself it gives every file the mode
600, so that nobody else can read it, and a process that is killed leaves the random name behind. So it writes into a
folder of ours here: `<file>.part`. What a killed process left there is removed by the next one that saves the same
file; a lock (disk/locks.py) protects the folder of a process that still runs. The mode is the one that any new file
gets (umask).

safetensors also calls a file missing that may not be read. So Python opens it first, whose error says what it is.

Limits: for a moment the disk holds the old file and the new one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..errors import UsageError
from .locks import alone


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors of any device to `path`, in place of a file of that name; makes its folder if it is missing.

    If it fails (OSError, SafetensorError), what was there before is still there, and nothing else.
    """
    from safetensors.torch import save_file

    path = path.expanduser()
    part = path.with_name(path.name + ".part")
    with alone(path, wait=True):
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir()
        try:
            file = part / path.name
            file.touch()
            mode = file.stat().st_mode
            save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, file, metadata)
            file.chmod(mode)
            os.replace(file, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Say what is wrong with `path` where reading it in here fails; `remedy` is for a file that is missing or damaged.

    FileNotFoundError, PermissionError or another OSError for a file that cannot be opened, ValueError for damage.
    """
    from safetensors import SafetensorError

    try:
        open(path, "rb").close()
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: {remedy}") from error
    except PermissionError as error:
        raise PermissionError(f"{path} may not be read by this user: chmod -R a+rX {path.parent} permits it") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error}): try again, or {remedy}") from error
    except SafetensorError as error:
        raise UsageError(f"{path} is truncated or damaged ({error}): {remedy}") from error
