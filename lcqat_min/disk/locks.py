"""One process at a time: a lock beside the file that is worked on.

The lock is the operating system's, on the file `<file>.lock` (the package filelock, which torch brings). The system
releases it when its process ends, however it ends, so a process that was killed never leaves a lock. (It may leave the
empty file, which means nothing.)

Limits: on a file system without locks, filelock uses the existence of the file instead, and a killed process keeps
others out until that file is deleted.
"""

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
    lock = FileLock(file, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(
            f"another process is at work here (it holds {file}): wait, or choose another folder"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not delete an open file; an empty file stays there
            file.unlink()  # while it is held: who opened it meanwhile finds it deleted, and opens the next one
        lock.release()
