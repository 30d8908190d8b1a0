"""The rooms of lcqat_min: each imports only from rooms below it, in the order of the README's table.

Imports inside functions and under TYPE_CHECKING count.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lcqat_min"
ROOMS = re.findall(r"^\| `(\w+)/` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


def imported_rooms(file: Path) -> set[str]:
    """Rooms that a file imports from, by relative imports or absolute ones of this package."""
    found, here = set(), file.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
            found |= {parts[0]} if parts[0] else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("lcqat_min"):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lcqat_min.")}
    return found & set(ROOMS)


def test_the_readme_lists_every_room():
    assert sorted(ROOMS) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"project", "__pycache__"} <= set(
        ROOMS
    )


def test_rooms_import_only_from_rooms_below():
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {room}"
        for place, name in enumerate(ROOMS)
        for file in (PACKAGE / name).glob("*.py")
        for room in imported_rooms(file)
        if ROOMS.index(room) < place
    ]
    assert wrong == []


def test_files_outside_of_rooms_import_from_none():
    free = {"__init__.py", "__main__.py", "hf.py"}  # what users import, and the two entrances
    files = [file for file in PACKAGE.glob("*.py") if file.name not in free]
    assert {file.name: imported_rooms(file) for file in files if imported_rooms(file)} == {}
