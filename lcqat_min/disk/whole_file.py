"""A file that is written whole or not at all, by one process at a time: under the same name in a folder beside it.

The folder is `<file>.part`. After the last byte, the file is renamed to its place, in one step. What a killed process
left in the folder is removed by the next one that writes the same file. A lock (disk/locks.py) protects the folder of
a process that still runs.

Limits: for a moment the disk holds the old file and the new one.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .locks import alone


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
