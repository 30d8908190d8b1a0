"""Files of results: what was measured, with what it takes to trace it, never half written.

A file is JSON: {"meta": ..., "rows": [...]} and whatever else its maker adds. `meta` is the birth certificate:
settings, commit, versions, machine and date. Every change writes the whole file under another name and renames it, so
a run that is cut off leaves the last whole file, and the next start goes on from its rows.

Several processes may add to one file: each takes a lock (disk/locks.py), reads the file again, adds its rows and
writes.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..disk.locks import alone


class Results:
    """compare.json of a run: {"meta", "rows", "curves", "samples"}; every change is written whole or not at all."""

    def __init__(self, path: Path, config: dict):
        self.path = path
        if path.exists():
            self.data = _made_with(path, config)
        else:
            self.data = {"meta": describe(config), "rows": [], "curves": {}, "samples": {}}

    def has(self, arm: str, seed: int) -> bool:
        """Whether this row is there already."""
        return any(row["arm"] == arm and row["seed"] == seed for row in self.data["rows"])

    def add(self, row: dict, history: list[dict], sample: str | None = None) -> None:
        """Take in a finished arm and write the file."""
        with self._changed() as data:
            if not self.has(row["arm"], row["seed"]):
                data["rows"].append(row)
            data["curves"][f"{row['arm']}/{row['seed']}"] = [
                {key: point[key] for key in ("tokens", "loss", "flips")} for point in history
            ]
        if sample is not None:
            self.add_sample(row["arm"], sample)

    def add_sample(self, arm: str, sample: str) -> None:
        """Take in how an arm continued the prompt and write the file."""
        with self._changed() as data:
            data["samples"][arm] = sample

    @contextmanager
    def _changed(self) -> Iterator[dict]:
        with alone(self.path, wait=True):
            if self.path.exists():  # another process may have added to it
                self.data = read_results(self.path)
            yield self.data
            write_json(self.path, self.data)


def _made_with(path: Path, config: dict) -> dict:
    """A results file that was made with these settings; ValueError that names the difference for any other."""
    data = read_results(path)
    if data["meta"]["config"] != config:
        raise ValueError(
            f"{path} was made with other settings: {difference(data['meta']['config'], config)}. Go on with the same "
            "ones, or begin a new file: without --resume, or after moving this one away."
        )
    return data


def read_results(path: Path) -> dict:
    """Read a results file; ValueError that names it when it is missing or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data["rows"], data["meta"]  # a results file has both
        return data
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot read results from {path} ({type(error).__name__}: {error}). Run `make compare` to make them again."
        ) from error


def rows_of(path: Path, config: dict | None = None) -> list[dict]:
    """Rows of a results file that may not be there yet; read anew each time, since another process may add some.

    config: ValueError if the file was made with other settings.
    """
    if not path.exists():
        return []
    return (read_results(path) if config is None else _made_with(path, config))["rows"]


def add_row(path: Path, row: dict, config: dict) -> None:
    """Append one finished row; see add_rows."""
    add_rows(path, [row], config)


def add_rows(path: Path, rows: list[dict], config: dict) -> None:
    """Append finished rows, all or none, each with a commit and a date of its own: several runs may make one file.

    ValueError if the file was made with other settings than `config`.
    """
    meta = describe(config)
    made = {key: meta[key] for key in ("commit", "date")}
    with alone(path, wait=True):
        write_json(path, {"meta": meta, "rows": [*rows_of(path, config), *(row | made for row in rows)]})


@contextmanager
def optional(what: str) -> Iterator[None]:
    """For what comes after the work is stored: if it fails, that is a note on stderr and not the end of the command."""
    try:
        yield
    except Exception as error:
        print(f"note: {what} ({type(error).__name__}: {str(error) or 'no message'})", file=sys.stderr)


def write_json(path: Path, data: dict) -> None:
    """Write JSON through a temporary file, so that the old file stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it is there if the disk was full


def describe(config: dict) -> dict:
    """The birth certificate of a result: settings, commit, versions, machine, date."""
    import transformers

    return {
        "config": config,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed, perhaps below a clone of something else
        return None
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def difference(old: dict, new: dict) -> str:
    """Where two settings differ, in words."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {str(old.get(key))[:60]}, is {str(new.get(key))[:60]}" for key in keys)
