"""How much code there is: lines per room, and what must be read or copied with each part of the promise.

    python scripts/size.py

A line counts if it has code: docstrings, comments and blank lines do not. A *closure* is a part and all that importing
it loads, without the rooms' __init__.py files, which only repeat names. Imports inside functions are not followed: they
are for what not everybody uses (checkpoints, files, Triton).
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import deque
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "lcqat_min"
QUIET = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
CLOSURES = {  # name: what is imported, at most so many lines of code
    "the layer": (("layer/linear",), 400),
    "quantize + train": (("ptq/model", "qat/loop"), 1150),
    "all that is promised": (
        ("ptq/model", "qat/loop", "packing/files", "packing/convert", "kernels/product", "kernels/triton_kernels"),
        1975,
    ),
}


def code_lines(file: Path) -> int:
    """Lines of a Python file that hold code."""
    source = file.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for t in tokens if t.type not in QUIET for line in range(t.start[0], t.end[0] + 1)}
    return len(code - docstrings)


def imports(file: Path, inside_functions: bool = False) -> set[Path]:
    """Files of the package that `file` imports: at its top, or anywhere (also for types only)."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if inside_functions else tree.body
    found = set()
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = file.parents[node.level - 1]
        module = folder.joinpath(*(node.module or "").split("."))
        submodules = {module / f"{name.name}.py" for name in node.names}
        found |= {path for path in submodules if path.is_file()} or {module.with_suffix(".py"), module / "__init__.py"}
    return {path for path in found if path.is_file()}


def closure(parts: tuple[str, ...]) -> set[Path]:
    """`parts` (paths without .py) and all files that importing them loads."""
    todo, found = deque(PACKAGE / f"{part}.py" for part in parts), set()
    while todo:
        if (file := todo.popleft()) not in found:
            found.add(file)
            todo += imports(file)
    return found


def main() -> None:
    """Print both tables."""
    rooms: dict[str, list[int]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.parent.name if file.parent != PACKAGE else file.name
        rooms.setdefault(room, []).append(code_lines(file))
    for room, lines in rooms.items():
        print(f"{room:<22}{len(lines):>3} files {sum(lines):>6} lines of code")
    print(f"{'in all':<22}{sum(map(len, rooms.values())):>3} files {sum(map(sum, rooms.values())):>6}\n")
    for name, (parts, limit) in CLOSURES.items():
        files = closure(parts)
        print(f"{name:<22}{len(files):>3} files {sum(map(code_lines, files)):>6} of at most {limit}")


if __name__ == "__main__":
    main()
