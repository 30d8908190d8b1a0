"""What this process may use of the machine: memory and processor cores. For `check`.

    system          /proc/meminfo: memory that is free, or would be if caches were given up
    control groups  Linux limits groups of processes; containers and batch systems are such groups. Groups are nested,
                    and the tightest limit holds. Version 2 has the files memory.max and cpu.max, version 1 a folder
                    each for memory and cpu

Where the system does not say (macOS, Windows), the answers are None and all cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_memory() -> tuple[int, bool] | None:
    """Bytes that this process can still get, and whether a control group is what limits them."""
    try:
        lines = dict(line.split(":", 1) for line in (PROC / "meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return None
    left = [_memory_left(group) for group in _groups("memory")]
    rest = min((number for number in left if number is not None), default=free)
    return (rest, True) if rest < free else (free, False)


def cores() -> float:
    """Processor cores that this process may use; a control group may allow a part of one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([allowed, *filter(None, map(_cores_of, _groups("cpu")))])


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, each from its own up to the root."""
    for line in _text(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = GROUPS / controllers
        own = base / path.lstrip("/")  # in a container it may be the path outside, which does not exist inside
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(base))


def _memory_left(group: Path) -> int | None:
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        numbers = [_text(group / name).strip() for name in (limit, used)]
        if all(map(str.isdecimal, numbers)):
            stat = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines())
            return max(0, int(numbers[0]) - int(numbers[1]) + int(stat.get(cache, 0)))  # caches can be freed
    return None


def _cores_of(group: Path) -> float | None:
    quota = _text(group / "cpu.max").split()
    quota = quota or [_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    return int(quota[0]) / int(quota[1]) if all(map(str.isdecimal, quota)) else None  # else "max" or -1: no limit


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # it does not exist, or may not be read
        return ""
