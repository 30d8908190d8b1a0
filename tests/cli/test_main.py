"""Exit codes and messages: mistakes of the caller are one line, bugs of this package keep their traceback.

pytest tests/cli/test_main.py
"""

import shutil
import sys

import pytest
import torch
from safetensors import SafetensorError

from lcqat_min.cli import commands
from lcqat_min.cli import main as cli
from lcqat_min.errors import UsageError
from lcqat_min.ptq.lcqat import LCQAT


@pytest.fixture
def raising(monkeypatch):
    """`raising(error, *options)`: exit code of a command in which that is raised."""

    def call(error: BaseException, *options: str) -> int:
        def run(args) -> None:
            raise error

        monkeypatch.setattr(commands, "run_bits", run)
        return cli.main([*options, "bits", "folder"])

    return call


@pytest.mark.parametrize(
    "error",
    [
        UsageError("a wrong name"),
        FileNotFoundError("a wrong name"),
        FloatingPointError("a wrong name"),
        SafetensorError("a wrong name"),
        torch.OutOfMemoryError("a wrong name"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_mistake_of_the_caller_is_one_line(raising, error, capsys):
    assert raising(error) == 2
    assert capsys.readouterr().err == "lcqat: a wrong name\n"


@pytest.mark.parametrize("options", [("--traceback", "bits", "folder"), ("bits", "folder", "--traceback")])
def test_a_traceback_is_shown_where_it_is_asked_for(monkeypatch, options, capsys):
    def run(args) -> None:
        raise UsageError("a wrong name")

    monkeypatch.setattr(commands, "run_bits", run)
    assert cli.main(list(options)) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "raise UsageError" in err and err.endswith("lcqat: a wrong name\n")


@pytest.mark.parametrize(
    "error", [ValueError("out of order"), KeyError("x"), TypeError("y"), ImportError("z", name="lcqat_min.nowhere")]
)
def test_a_bug_is_not_taken_for_a_mistake_of_the_caller(raising, error, capsys):
    assert raising(error) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and f"{type(error).__name__}: {error}" in err
    assert err.splitlines()[-1] == "lcqat: this is a bug: please report it, with the lines above"


def test_a_package_that_is_missing_is_one_line(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["bits", str(place / "model")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lcqat: ") and "transformers" in line and f"Install it for {sys.executable}" in line


def test_ctrl_c_says_what_is_kept(raising, capsys):
    assert raising(KeyboardInterrupt()) == 130
    assert "the last checkpoint" in capsys.readouterr().err


def test_python_code_sees_an_ordinary_value_error():
    with pytest.raises(ValueError, match="choose one of") as caught:
        LCQAT(rotate="row")
    assert type(caught.value) is UsageError


@pytest.mark.parametrize("command", ["bits", "generate", "quantize", "train"])
@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", "{"),
        ("config.json", '{"model_type": "nobody-knows"}'),
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("model.safetensors", "short"),
    ],
)
def test_damaged_files_are_mistakes_that_are_named(place, tmp_path, command, name, content, capsys):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / name).write_text(content)
    text = ["--text", str(place / "text.txt"), "--out", str(tmp_path / "out")]
    args = {
        "bits": ["bits", tmp_path / "model"],
        "generate": ["generate", tmp_path / "model"],
        "quantize": ["quantize", "--model", tmp_path / "model", *text],
        "train": ["train", tmp_path / "model", *text],
    }
    assert cli.main([str(arg) for arg in args[command]]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path / "model") in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["nobody/nothing", "no such model", "a/b/c", "--"])
@pytest.mark.parametrize("command", ["bits", "generate"])
def test_names_that_the_hub_does_not_know_are_mistakes(command, name, capsys):
    assert cli.main([command, "--", name]) == 2
    assert capsys.readouterr().err.startswith(f"lcqat: cannot load {name!r}")
