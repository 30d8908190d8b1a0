"""Token ids of a text, kept on disk: reading and encoding all docstrings takes a minute, reading the ids no time.

    <folder>/<source>-<key>.safetensors       the key: 16 hex digits of all that the ids depend on

The cache is a convenience. Where it cannot be read or written (a damaged file, a read-only disk, a process of another
user, a user without a home) a note on stderr says so, and the text is built anew.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from torch import LongTensor

from ..disk.tensor_file import reading, save_tensors
from .corpus import installed_versions

FORMAT = 1  # part of the key: raise it when reading or splitting changes


def cached(
    source: str, tokenizer, build: Callable[[], dict[str, LongTensor]], folder: Path | None = None
) -> dict[str, LongTensor]:
    """What `build` returns, by name of the split: read from `folder` (None: default_cache()), else kept there.

    Only `build` raises: what is wrong with the cache is a note.
    """
    try:
        folder = Path(folder) if folder is not None else default_cache()
    except RuntimeError as error:  # pathlib, for a user without a home
        _note_not_kept(error)
        return build()
    path = folder / f"{source}-{fingerprint(source, tokenizer)}.safetensors"
    if (ids := _read(path)) is None:
        _write(path, ids := build())
    return ids


def default_cache() -> Path:
    """$LCQAT_CACHE, else $XDG_CACHE_HOME/lcqat-min, else ~/.cache/lcqat-min; RuntimeError for a user without a home."""
    if os.environ.get("LCQAT_CACHE"):
        return Path(os.environ["LCQAT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lcqat-min"


def fingerprint(source: str, tokenizer) -> str:
    """What the ids depend on, as 16 hex digits: tokenizer, versions of packages and of Python, format."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    versions = installed_versions() if source == "docstrings" else []
    key = json.dumps([FORMAT, source, versions, tokenizer.eos_token_id, vocabulary])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, LongTensor] | None:
    from safetensors.torch import load_file

    try:
        if not path.exists():
            return None
        with reading(path, "a new one takes its place"):
            tensors = load_file(path)
        return {name: tensors[name].long() for name in ("train", "validation", "test")}
    except (ValueError, KeyError, OSError) as error:
        print(f"note: cannot read the cached text {path} ({error}); building it anew", file=sys.stderr)
        return None


def _write(path: Path, ids: dict[str, LongTensor]) -> None:
    from safetensors import SafetensorError

    try:
        save_tensors({name: part.int() for name, part in ids.items()}, path)
    except (SafetensorError, OSError) as error:
        _note_not_kept(f"{path}: {error}")


def _note_not_kept(why: object) -> None:
    print(
        f"note: cannot keep the text ({why}), so it will be built anew each time; set LCQAT_CACHE to a folder that "
        "can be written",
        file=sys.stderr,
    )
