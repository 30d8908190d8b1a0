"""A file that is written whole or not at all, and a lock: one process at a time.

`whole_file` writes under the same name in a folder beside the file, `<file>.part`. After the last byte, the file is
renamed to its place, in one step. What a killed process left in the folder is removed by the next one that writes the
same file. A lock protects the folder of a process that still runs.

The lock is the operating system's, on the file `<file>.lock`, by the package filelock, which torch needs as well. The
system releases it when its process ends, however it ends, so a process that was killed never leaves a lock. (It may
leave the empty file, which means nothing.)

Limits: for a moment the disk holds the old file and the new one. On a file system without locks, filelock uses the
existence of the file instead, and a killed process keeps others out until that file is deleted.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UsageError


@contextmanager
def alone(path: Path, wait: bool = False) -> Iterator[None]:
    """Lets one process at a time in for `path`. Another one waits, or gets a ValueError if not `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(path.name + ".lock")
    try:
        held = FileLock(file).acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise UsageError(f"another process is at work here ({file}): wait, or choose another folder") from error
    with held:
        try:
            yield
        finally:
            with suppress(OSError):  # Windows deletes no open file; filelock deletes it there, afterwards
                file.unlink()  # while it is held: who opened it meanwhile finds it deleted, and makes a new one


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; at the end that file takes the place of `path`, after an error it is removed."""
    part = path.with_name(path.name + ".part")
    with alone(part, wait=True):
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir()
        try:
            yield part / path.name
            os.replace(part / path.name, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
