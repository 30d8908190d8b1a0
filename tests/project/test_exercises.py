"""Exercises: each stub is open, each solution right, each planted mistake caught, and the check says why.

Stubs and solutions are taken from the notebooks themselves, so they cannot drift apart from the checks; the mistakes
are in tests/project/wrong_answers/wrong_NN.py.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
sys.path.insert(0, str(FOLDER))

from course.exercise import CHECKS, Wrong, exercise, expect_close, verdict  # noqa: E402

PATHS = sorted(FOLDER.glob("*.ipynb"))
SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>\s*```python\n(.*?)```\s*</details>", re.S)
STUB = re.compile(r"^check\((\w+)\)$", re.M)


def cells(path: Path) -> list[tuple[str, str, list[str]]]:
    """(kind, source, tags) of each cell."""
    book = json.loads(path.read_text(encoding="utf-8"))
    return [(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", [])) for c in book["cells"]]


def stubs(path: Path) -> dict[str, str]:
    """Exercise -> source of its stub cell."""
    found = {}
    for kind, text, tags in cells(path):
        if kind == "code" and "exercise" in tags:
            name = STUB.search(text)
            assert name, f"an exercise cell of {path.name} lacks its check(...):\n{text}"
            found[name[1]] = text
    return found


def solutions(path: Path) -> dict[str, str]:
    """Exercise -> source of its folded solution."""
    sources = [source for kind, text, _ in cells(path) if kind == "markdown" for source in SOLUTION.findall(text)]
    return {re.findall(r"^def (\w+)\(", source, re.M)[-1]: source for source in sources}


EXERCISES = [(path, name) for path in PATHS for name in stubs(path)]
each = pytest.mark.parametrize(("path", "name"), EXERCISES, ids=[f"{p.stem[:2]}-{name}" for p, name in EXERCISES])


def defined(path: Path, source: str, name: str) -> object:
    """A function from source that may use what the notebook's setup cell imports."""
    setup = next(text for kind, text, tags in cells(path) if kind == "code" and "setup" in tags)
    space: dict = {"__name__": "notebook"}
    exec(compile(setup, f"{path.name} setup", "exec"), space)
    exec(compile(STUB.sub("", source), f"{path.name} {name}", "exec"), space)
    return space[name]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_two_to_four_exercises_each_with_card_hint_and_solution(path):
    names, text = stubs(path), "\n".join(source for kind, source, _ in cells(path) if kind == "markdown")
    if path.stem.startswith("00"):
        assert len(names) >= 1
    else:
        assert 2 <= len(names) <= 4
    assert set(solutions(path)) == set(names)
    assert len(re.findall(r"^### Exercise .*\((★|☆)+, \d+ minutes\)$", text, re.M)) == len(names)
    assert text.count("<summary>Hint</summary>") == len(names)


@each
def test_the_stub_is_open(path, name):
    stub = stubs(path)[name]
    assert re.search(rf"def {name}\([^)]*:.*\) -> ", stub, re.S), "a typed signature"
    assert verdict(defined(path, stub, name)).state == "open"


@each
def test_the_solution_is_right(path, name):
    found = verdict(defined(path, solutions(path)[name], name))
    assert found.state == "right", found.message


@each
def test_planted_mistakes_are_caught(path, name):
    file = Path(__file__).parent / "wrong_answers" / f"wrong_{path.stem[:2]}.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mistakes = module.WRONG[name]
    assert mistakes
    for mistake in mistakes:
        mistake.__name__ = name
        found = verdict(mistake)
        assert found.state == "wrong" and found.message.startswith(f"{name}: not yet. "), found


def test_every_check_belongs_to_an_exercise():
    verdict.__globals__["_load"]()
    assert set(CHECKS) == {name for _, name in EXERCISES}


def test_a_crash_is_a_verdict_not_an_exception():
    name = sorted(CHECKS)[0]

    def answer(*args, **options):
        raise ZeroDivisionError("by zero")

    answer.__name__ = name
    found = verdict(answer)
    assert found.state == "wrong" and "ZeroDivisionError: by zero" in found.message


def test_errors_of_the_checks_themselves():
    with pytest.raises(ValueError, match="no exercise called 'unheard_of'; choose one of "):
        verdict(type("f", (), {"__name__": "unheard_of"})())
    with pytest.raises(ValueError, match="two exercises are called"):
        exercise(CHECKS[sorted(CHECKS)[0]])


def test_expect_close_says_what_is_off():
    expect_close([1.0, 2.0], [1.0, 2.0], "the result")
    wrong = {"is None: does": None, "is a str": "x", r"has shape \[1\]": [1.0], "3 where 2": [1.0, 3.0]}
    for message, got in wrong.items():
        with pytest.raises(Wrong, match=message):
            expect_close(got, [1.0, 2.0], "the result")
