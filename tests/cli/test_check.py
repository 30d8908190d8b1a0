"""`check`: all well here; each broken part is named with its remedy and does not hide the others.

pytest tests/cli/test_check.py
"""

import subprocess
import sys
from pathlib import Path

import pytest

from lcqat_min.cli import check as preflight
from lcqat_min.cli import machine
from lcqat_min.cli import main as cli
from lcqat_min.harness import models as hub


@pytest.fixture
def quick(monkeypatch):
    """Without the checks that load things; the memory of the machine that tests run on is not the subject."""
    checks = (preflight.python, preflight.packages, preflight.arithmetic, preflight.disk)
    monkeypatch.setattr(preflight, "NEEDED", checks)


def test_each_needed_check_passes_here():
    for examine in (preflight.packages, preflight.arithmetic, preflight.model, preflight.notebooks):
        ok, found = preflight._verdict(examine)
        assert ok and found, f"{examine.__name__}: {found}"


def test_all_well_ends_with_code_0(quick, capsys):
    assert cli.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "All that is needed is here."
    assert [line.split()[0] for line in lines[:4]] == ["ok"] * 4


def test_a_problem_names_its_remedy_and_the_rest_goes_on(quick, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "NEEDED_DISK", 1e30)
    assert cli.main(["check"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM  disk" in out and "Delete something" in out
    assert "ok       arithmetic" in out and "gpu" in out
    assert out.endswith("Solve the lines marked PROBLEM, then run this again.\n")


def test_what_is_missing_is_named(monkeypatch):
    find = preflight.importlib.util.find_spec
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    with pytest.raises(preflight.Problem, match="cannot import datasets. Set up .venv"):
        preflight.packages()


def test_a_python_without_torch_is_told_so_in_one_line():
    root = Path(preflight.__file__).resolve().parents[2]
    command = [sys.executable, "-S", "-m", "lcqat_min", "check"]  # -S: none of the installed packages
    found = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert found.returncode != 0 and len(found.stderr.splitlines()) == 1
    assert "lcqat_min needs torch" in found.stderr and "README.md" in found.stderr


def test_a_lost_model_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "BUNDLED", tmp_path / "nowhere")
    with pytest.raises(preflight.Problem, match="git checkout -- models"):
        preflight.model()


def test_wrong_arithmetic_is_noticed(monkeypatch):
    from lcqat_min.codebook import scalar

    monkeypatch.setattr("lcqat_min.ptq.lcqat.normal_codebook", lambda *kind: scalar(5.0))
    with pytest.raises(preflight.Problem, match="Install the torch of constraints.txt"):
        preflight.arithmetic()


def test_an_unforeseen_failure_is_one_line(monkeypatch):
    def broken() -> str:
        raise OSError("no such device")

    assert preflight._verdict(broken) == (
        False,
        "OSError: no such device. Run `make setup` again; if it stays, report this line.",
    )


@pytest.fixture
def linux(tmp_path, monkeypatch):
    """A machine in a folder: `linux(file=content, ...)` writes below it; 8 GB are free and the group is /a/b."""
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "cgroup")

    def write(**files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)

    write(**{"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n", "proc/self/cgroup": "0::/a/b\n"})
    return write


def test_memory_is_the_minimum_of_what_system_and_groups_leave(linux):
    assert machine.free_memory() == (8_192_000_000, False)
    linux(**{"cgroup/a/b/memory.max": "max\n", "cgroup/a/b/memory.current": "5\n"})
    assert machine.free_memory() == (8_192_000_000, False)
    linux(
        **{
            "cgroup/a/memory.max": "2000000000\n",
            "cgroup/a/memory.current": "1500000000\n",
            "cgroup/a/memory.stat": "anon 1\ninactive_file 400000000\n",
        }
    )
    assert machine.free_memory() == (900_000_000, True)
    with pytest.raises(preflight.Problem, match="0.9 GB are free.*limit of this container.*docker run --memory"):
        preflight.memory()


def test_memory_of_version_1_groups_whose_path_is_that_outside(linux):
    linux(
        **{
            "proc/self/cgroup": "3:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n",
            "cgroup/memory/memory.limit_in_bytes": "1000",
            "cgroup/memory/memory.usage_in_bytes": "1500",
        }
    )
    assert machine.free_memory() == (0, True)


def test_memory_of_a_system_that_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.free_memory() is None and preflight.memory() == "this system does not say"


@pytest.mark.parametrize(
    "files",
    [
        {"cgroup/a/b/cpu.max": "50000 100000\n", "cgroup/a/cpu.max": "max 100000\n"},
        {
            "proc/self/cgroup": "3:cpu:/a\n",
            "cgroup/cpu/a/cpu.cfs_quota_us": "50000",
            "cgroup/cpu/a/cpu.cfs_period_us": "100000",
            "cgroup/cpu/cpu.cfs_quota_us": "-1",
        },
    ],
)
def test_cores_are_what_a_group_allows(linux, files, monkeypatch):
    monkeypatch.setattr(preflight.os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    monkeypatch.setattr(preflight.os, "cpu_count", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert machine.cores() >= 1
    linux(**files)
    assert machine.cores() == 0.5
    with pytest.raises(preflight.Problem, match="0.5 of 8 cores may be used .*Set OMP_NUM_THREADS=1"):
        preflight.processors()


def test_a_busy_machine_is_named(linux, monkeypatch):
    monkeypatch.setattr(preflight, "cores", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr(preflight.os, "getloadavg", lambda: (2.5, 0.0, 0.0), raising=False)
    assert "load 2.5" in preflight.processors()
    monkeypatch.setattr(preflight.os, "getloadavg", lambda: (3.5, 0.0, 0.0), raising=False)
    with pytest.raises(preflight.Problem, match="busy: cores 2, load 3.5.*Close other programs"):
        preflight.processors()
