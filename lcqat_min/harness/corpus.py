"""A corpus that every reader has: the docstrings of the installed packages.

    source code --ast--> docstrings of modules, classes, functions; and the string constants of pydoc_data.topics,
                         the language reference that help() shows

Source is parsed, never imported: reading documentation must not run code.

Limits: docstrings of one package resemble each other (near-duplicates are not removed), so a model predicts unseen ones
better than other text; and readers with other package versions have other texts.
"""

import ast
import gc
import importlib.metadata
import importlib.util
import inspect
import os
import sys
import sysconfig
import warnings
from pathlib import Path

PACKAGES = tuple(
    "torch numpy sympy networkx pandas matplotlib transformers datasets tokenizers safetensors "
    "huggingface_hub accelerate pyarrow mpmath PIL fontTools setuptools pydantic IPython jedi jinja2 "
    "hypothesis rich requests fsspec".split()
)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
MIN_CHARS = 100  # a docstring shorter than this is a label, not a text
SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "_vendor"}


def docstrings_of(source: bytes | str) -> list[str]:
    """Docstrings of a module and of the classes and functions in it, dedented; [] if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the source
            todo: list[Documented] = [ast.parse(source)]
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = []
    while todo:
        node = todo.pop()
        found.append(ast.get_docstring(node, clean=True) or "")
        todo += [n for n in node.body if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    # A tokenizer cannot encode one half of a surrogate pair, which a string literal may hold.
    return [text.encode("utf-8", "ignore").decode() for text in found if text]


def topics_of(source: bytes | str) -> list[str]:
    """The string constants of a module; those of `pydoc_data.topics` are the language reference."""
    values = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return [inspect.cleandoc(value) for value in values if isinstance(value, str)]


def python_files(root: Path) -> list[Path]:
    """The .py files below `root`, without tests and vendored copies."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        found += [Path(folder) / name for name in names if name.endswith(".py")]
    return found


def _package_folders() -> list[Path]:
    """The standard library and those of PACKAGES that are installed."""
    specs = [importlib.util.find_spec(name) for name in PACKAGES]  # a top-level name: imports nothing
    folders = [folder for spec in specs if spec for folder in spec.submodule_search_locations or []]
    return [Path(sysconfig.get_paths()["stdlib"]), *map(Path, folders)]


def docstrings() -> list[str]:
    """All docstrings of at least MIN_CHARS characters."""
    from tqdm.auto import tqdm

    files = [path for folder in _package_folders() for path in python_files(folder)]
    texts = []
    was_on = gc.isenabled()
    gc.disable()  # syntax trees have no cycles, and searching for them takes a third of the time
    try:
        for path in tqdm(files, desc="reading docstrings", unit=" files"):
            try:
                source = path.read_bytes()
            except OSError:  # a dangling link, or a file that this user may not read
                continue
            texts += topics_of(source) if path.match("pydoc_data/topics.py") else docstrings_of(source)
    finally:
        if was_on:
            gc.enable()
    return [text for text in texts if len(text) >= MIN_CHARS]


def installed_versions() -> list[tuple]:
    """What `docstrings` depends on: the version of Python and (name, version) of each package that it reads."""
    owners = importlib.metadata.packages_distributions()  # import name -> names on the package index
    installed = sorted({owner for name in PACKAGES for owner in owners.get(name, [])})
    return [(name, importlib.metadata.version(name)) for name in installed] + [sys.version_info[:3]]
