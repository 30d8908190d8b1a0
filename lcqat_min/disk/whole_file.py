"""A file that is replaced whole or not at all: it is written under another name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; at the end that file takes the place of `path`, after an error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{os.getpid()}-{path.name}")  # the suffix stays: it may decide the format
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
