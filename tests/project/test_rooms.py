"""The layout: each room imports only rooms below it, no file imports in a circle, every room says what it is for.

Imports inside functions and for types only count as well. The sizes of what readers copy stay within their bars.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lcqat_min"
sys.path.insert(0, str(ROOT / "scripts"))

from size import CLOSURES, closure, code_lines, imports  # noqa: E402

ROOMS = ["cli", "harness", "packing", "systems", "qat", "ptq", "kernels", "layer", "codebook"]  # from top to bottom
BELOW = ["language_model", "disk", "errors"]
PUBLIC = ["__init__", "__main__", "hf"]  # above all rooms
FILES = sorted(PACKAGE.rglob("*.py"))


def level(file: Path) -> int:
    """The place of a file's room, counted from the top."""
    name = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return -1 if name in PUBLIC else [*ROOMS, *BELOW, "micro"].index(name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_what_is_below_it(file):
    mine = level(file)
    above = [path for path in imports(file, inside_functions=True) if level(path) < mine]
    assert [path.relative_to(PACKAGE).as_posix() for path in above] == []


def test_no_circle():
    """Every file can be put after all those that it imports; faces are not files that others of their room import."""
    left = {file: imports(file, inside_functions=True) - {file} for file in FILES}
    while ready := {file for file, needs in left.items() if not needs & left.keys()}:
        left = {file: needs for file, needs in left.items() if file not in ready}
    assert [file.relative_to(PACKAGE).as_posix() for file in left] == []


def test_micro_stands_alone():
    assert imports(PACKAGE / "micro.py", inside_functions=True) == set()
    assert not any(PACKAGE / "micro.py" in imports(file, inside_functions=True) for file in FILES)


@pytest.mark.parametrize("room", [*ROOMS, "disk"])
def test_every_room_says_in_one_sentence_what_it_is_for(room):
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert text and 20 < len(text.split("\n")[0]) < 120
    assert f"`{room}/`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_tests_mirror_the_rooms():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*ROOMS, "disk", "project"}


@pytest.mark.parametrize("name", CLOSURES)
def test_what_readers_copy_stays_small(name):
    parts, limit = CLOSURES[name]
    files = closure(parts)
    assert len(files) > len(parts)
    assert sum(map(code_lines, files)) <= limit
