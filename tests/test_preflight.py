"""`check`: all well here; each broken part is named with its remedy and does not hide the others.

pytest tests/test_preflight.py
"""

import subprocess
import sys
from pathlib import Path

import pytest

from lcqat_min import cli, hub, preflight


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
    assert "PROBLEM  disk" in out and "Make room" in out
    assert "ok       arithmetic" in out and "gpu" in out
    assert out.endswith("Mend the lines marked PROBLEM, then run this again.\n")


def test_what_is_missing_is_named(monkeypatch):
    find = preflight.importlib.util.find_spec
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    with pytest.raises(preflight.Problem, match="datasets cannot be imported by .*Set up .venv"):
        preflight.packages()


def test_a_python_without_torch_is_told_so_in_one_line():
    root = Path(preflight.__file__).resolve().parents[1]
    command = [sys.executable, "-S", "-m", "lcqat_min", "check"]  # -S: none of the installed packages
    found = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert found.returncode != 0 and len(found.stderr.splitlines()) == 1
    assert "lcqat_min needs torch" in found.stderr and "README.md" in found.stderr


def test_a_lost_model_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "BUNDLED", tmp_path / "nowhere")
    with pytest.raises(preflight.Problem, match="git checkout -- models"):
        preflight.model()


def test_wrong_arithmetic_is_noticed(monkeypatch):
    from lcqat_min import ptq
    from lcqat_min.codebook import scalar

    monkeypatch.setattr(ptq, "normal_codebook", lambda *kind: scalar(5.0))
    with pytest.raises(preflight.Problem, match="Install the torch of constraints.txt"):
        preflight.arithmetic()


def test_an_unforeseen_failure_is_one_line(monkeypatch):
    def broken() -> str:
        raise OSError("no such device")

    assert preflight._verdict(broken) == (
        False, "OSError: no such device. Run `make setup` again; if it stays, report this line."
    )
