"""Files of results: what was measured and how, never half written.

A file is JSON: {"meta": ..., "rows": [...]} and whatever else its maker adds. `meta` holds settings, commit, versions,
machine and date. Every change writes the whole file (disk/whole_file.py), so a run that is stopped leaves the last
whole file, and the next start goes on from its rows.

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
from ..disk.whole_file import whole_file
from ..errors import UsageError


class Results:
    """compare.json of a run: {"meta", "rows", "curves", "samples"}; every change is written whole or not at all."""

    def __init__(self, path: Path, config: dict):
        """Goes on with a file that is there; UsageError if that was made with other settings than `config`."""
        self.path = path
        if path.exists():
            self.data = _made_with(path, config)
        else:
            self.data = {"meta": describe(config), "rows": [], "curves": {}, "samples": {}}

    def has(self, method: str, seed: int) -> bool:
        """Whether this row is there already."""
        return any(row["method"] == method and row["seed"] == seed for row in self.data["rows"])

    def add(self, row: dict, history: list[dict]) -> None:
        """Add the row and the training history of a method and write the file."""
        with self._changed() as data:
            if not self.has(row["method"], row["seed"]):
                data["rows"].append(row)
            data["curves"][f"{row['method']}/{row['seed']}"] = [
                {key: point[key] for key in ("tokens", "loss", "flips")} for point in history
            ]

    def add_sample(self, method: str, sample: str) -> None:
        """Add a continuation of the prompt and write the file."""
        with self._changed() as data:
            data["samples"][method] = sample

    @contextmanager
    def _changed(self) -> Iterator[dict]:
        with alone(self.path, wait=True):
            if self.path.exists():  # another process may have added to it
                self.data = read_results(self.path)
            yield self.data
            write_json(self.path, self.data)


def _made_with(path: Path, config: dict) -> dict:
    """A results file that was made with these settings; UsageError that names the difference for any other."""
    data = read_results(path)
    if data["meta"]["config"] != config:
        raise UsageError(
            f"{path} was made with other settings: {difference(data['meta']['config'], config)}. Use the same ones, or "
            "begin a new file: give another name, or move this one away."
        )
    return data


def read_results(path: Path) -> dict:
    """Read a results file; UsageError that names it when it is missing or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data["rows"], data["meta"]  # a results file has both
        return data
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"cannot read results from {path} ({type(error).__name__}: {error}). Run `make compare` to make them again."
        ) from error


def rows_of(path: Path, config: dict) -> list[dict]:
    """Rows of a results file, [] if there is none yet; read again each time, since other processes may add some.

    UsageError if the file was made with other settings than `config`.
    """
    return _made_with(path, config)["rows"] if path.exists() else []


def add_rows(path: Path, rows: list[dict], config: dict) -> None:
    """Append finished rows, all or none, each with its commit and date, as several runs may make one file.

    UsageError if the file was made with other settings than `config`.
    """
    meta = describe(config)
    made = {key: meta[key] for key in ("commit", "date")}
    with alone(path, wait=True):
        write_json(path, {"meta": meta, "rows": [*rows_of(path, config), *(row | made for row in rows)]})


@contextmanager
def optional(what: str) -> Iterator[None]:
    """For what follows after the work is stored: a failure is a note on stderr and does not end the command."""
    try:
        yield
    except Exception as error:
        print(f"note: {what} ({type(error).__name__}: {str(error) or 'no message'})", file=sys.stderr)


def write_json(path: Path, data: dict) -> None:
    """Write JSON; until it is whole, the old file stays."""
    with whole_file(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def describe(config: dict) -> dict:
    """What a result was made with: settings, commit, versions, machine, date."""
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
    if not (root / ".git").exists():  # installed, perhaps inside a clone of something else
        return None
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def difference(old: dict, new: dict) -> str:
    """Where two settings differ, in words; "" if nowhere."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {str(old.get(key))[:60]}, is {str(new.get(key))[:60]}" for key in keys)
