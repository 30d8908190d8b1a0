"""Files of tensors: whole or not at all, as readable as umask says, nothing left behind, faults called what they are.

Checked: modes under two umasks, and that nothing else here writes tensors; a process killed while it writes, and one
that still runs; a write that fails; missing, forbidden, damaged and unreadable files, told apart.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lcqat_min.disk.tensor_file import reading, save_tensors
from lcqat_min.disk.whole_file import alone

ROOT = Path(__file__).resolve().parents[2]


def mode(file: Path) -> int:
    return file.stat().st_mode & 0o777


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("umask", [0o022, 0o007], indirect=True)
def test_a_file_is_as_readable_as_any_new_file(umask, tmp_path):
    (tmp_path / "plain").write_text("")
    save_tensors({"a": torch.ones(3)}, tmp_path / "new" / "file.safetensors", {"key": "value"})
    assert mode(tmp_path / "new" / "file.safetensors") == mode(tmp_path / "plain") == 0o666 & ~umask
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["file.safetensors"]


def test_no_other_module_writes_tensors_by_itself():
    others = [file for file in (ROOT / "lcqat_min").rglob("*.py") if file.name != "tensor_file.py"]
    assert len(others) > 20 and [file.name for file in others if "save_file" in file.read_text(encoding="utf-8")] == []


def test_tensors_in_any_layout_come_back_and_a_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    save_tensors({"weight": weight.T}, Path("~/file.safetensors"))
    assert torch.equal(load_file(tmp_path / "file.safetensors")["weight"], weight.T)


@pytest.mark.parametrize("fault", [OSError(28, "No space left"), SafetensorError("no space"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(fault, tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    save_tensors({"a": torch.ones(3)}, path)
    before = path.read_bytes()

    def stop(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", stop)
        with pytest.raises(type(fault)):
            save_tensors({"a": torch.zeros(3)}, path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_what_a_killed_process_left_is_cleared_and_a_running_one_is_waited_for(tmp_path):
    path = tmp_path / "file.safetensors"
    program = (
        "import os, sys, torch, safetensors.torch\n"
        "from pathlib import Path\n"
        "from lcqat_min.disk.tensor_file import save_tensors\n"
        "def half(tensors, file, metadata):\n"
        "    Path(file).with_name('.tmpABC').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), 9)\n"
        "safetensors.torch.save_file = half\n"
        "save_tensors({'a': torch.ones(3)}, Path(sys.argv[1]))\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT)
    assert run.returncode == -signal.SIGKILL and list(tmp_path.rglob(".tmpABC"))
    save_tensors({"a": torch.ones(3)}, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with alone(path), pytest.raises(ValueError, match="another process is at work here"), alone(path):
        pass  # what save_tensors waits for


@pytest.mark.parametrize(
    "make, kind, message",
    [
        (lambda file: None, FileNotFoundError, "file.safetensors cannot be read .*No such file.*: make it again"),
        (lambda file: file.write_bytes(b"\xff" * 64), ValueError, "file.safetensors is truncated or damaged .*: make"),
        (lambda file: file.mkdir(), OSError, "file.safetensors cannot be read .*: make it again"),
    ],
)
def test_missing_damaged_and_unreadable_are_told_apart(make, kind, message, tmp_path):
    file = tmp_path / "file.safetensors"
    make(file)
    with pytest.raises(kind, match=message), reading(file, "make it again"):
        load_file(file)


def test_a_file_of_somebody_else_is_forbidden_and_not_missing(tmp_path, monkeypatch):
    """safetensors says "No such file" of a file that it may not open, and root may open all: both are played here."""
    file = tmp_path / "file.safetensors"
    save_tensors({"a": torch.ones(3)}, file)
    real = open

    def forbidden(path, *args, **kwargs):
        if Path(path) == file:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", forbidden)
    with (
        pytest.raises(PermissionError, match="cannot be read .*Permission denied.*: make it"),
        reading(file, "make it"),
    ):
        raise FileNotFoundError(f"No such file or directory: {file}")
