"""One process at a time: a lock beside the file that is worked on.

The lock is the operating system's, on an open file of the name `<file>.lock`. The system releases it when its process
ends, however it ends, so a process that was killed never leaves a lock. (It may leave the empty file, which means
nothing.)

Limits: a file system without locks lets every process in. What is written there is still never damaged, since files
are written whole and renamed; but of two processes that add to one file at the same moment, one may lose its rows.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import UsageError

HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # another process holds the lock; other errors: there are no locks


@contextmanager
def alone(path: Path, wait: bool = False) -> Iterator[None]:
    """Lets one process at a time in for `path`. Another one waits, or gets a ValueError if not `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(path.name + ".lock")
    while True:
        file = open(name, "ab")
        if not (held := _held_elsewhere(file)) and _is_named(file, name):
            break
        file.close()
        if held and not wait:
            raise UsageError(f"another process is at work here (it holds {name}): wait, or choose another folder")
        time.sleep(0.02)
    with file:
        try:
            yield
        finally:
            with suppress(OSError):  # Windows keeps the name of an open file; an empty file stays there
                name.unlink()


def _held_elsewhere(file: IO) -> bool:
    """Take the lock of an open file; True if another process, or another call of this one, has it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in HELD
    return False


def _is_named(file: IO, name: Path) -> bool:
    """Whether an open file still has this name: the process that had the lock before removed it at its end."""
    with suppress(OSError):
        return os.name == "nt" or os.path.samestat(os.fstat(file.fileno()), os.stat(name))
    return False
