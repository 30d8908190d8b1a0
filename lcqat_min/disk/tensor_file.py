"""A file of tensors: written whole or not at all, and what is wrong with one in the right word.

safetensors (0.8) writes under a random name beside the file and renames that. Left to itself it gives every file the
mode 600, so that nobody else can read it, and a process that is killed leaves the random name behind. So it writes into
a folder of ours here: `<file>.part`. What a killed process left there is removed by the next one that saves the same
file; a lock (disk/locks.py) keeps away from the folder of a process that still runs. The mode is the one that any new
file gets (umask).

safetensors also calls a file that may not be read missing. Opened by Python first, it is named as what it is.
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
    """Write tensors of any device to `path`, in the place of a file of that name; its folder is made if need be.

    If it fails (OSError, SafetensorError), what was there before is still there, and nothing else.
    """
    from safetensors.torch import save_file

    path = path.expanduser()
    with alone(path, wait=True):
        part = path.with_name(path.name + ".part")
        if part.is_file():  # of an earlier version
            part.unlink()
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
    """Say of what goes wrong with `path` in here what it is, with the `remedy` where the file is missing or damaged.

    FileNotFoundError, PermissionError or another OSError for a file that cannot be opened, ValueError for damage.
    """
    from safetensors import SafetensorError

    try:
        with open(path, "rb"):
            pass
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: {remedy}") from error
    except PermissionError as error:
        raise PermissionError(
            f"{path} may not be read by this user: its owner can permit it, for instance by chmod -R a+rX {path.parent}"
        ) from error
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error}): try again, or {remedy}") from error
    except SafetensorError as error:
        raise UsageError(f"{path} is truncated or damaged ({error}): {remedy}") from error
