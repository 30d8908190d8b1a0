"""The frame of every notebook, without running it: headings, sizes, order, links, clean outputs.

That the cells run and still print what is stored is nbval's part (`make test`).
"""

import json
import re
from itertools import groupby
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
SECTIONS = ("## What you will do and learn", "## Exercises", "## What we found", "## In practice")
MACHINE = re.compile(r"/(home|tmp|work|root|Users|usr|opt)/|[A-Z]:\\\\|0x[0-9a-f]{6,}")
TIMING = re.compile(r"\b\d+(\.\d+)? ?(s|ms|us|µs|sec|seconds|min|minutes)\b|it/s")

pytestmark = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def markdown(book: dict) -> list[str]:
    return [source(cell) for cell in book["cells"] if cell["cell_type"] == "markdown"]


def code(book: dict) -> list[dict]:
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def printed(cell: dict) -> str:
    """All text that a cell's outputs hold."""
    texts = []
    for output in cell["outputs"]:
        texts += ["".join(output.get("text", ""))]
        texts += ["".join(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(texts)


def test_title_question_and_sections_in_order(path):
    texts = markdown(read(path))
    number = path.stem[:2]
    assert re.search(rf"^# {number} · [A-Z]\w+ ", texts[0], re.M), "the title: '# NN · Verb …'"
    assert "**Question.**" in texts[0] and texts[0].count("?") >= 1
    card = texts[1]
    for row in ("| Time |", "| Needs |", "| Builds on |", "| Module |"):
        assert row in card, f"the card lacks {row}"
    all_text = "\n".join(texts)
    places = [all_text.find(f"\n{section}") for section in SECTIONS]
    assert -1 not in places and places == sorted(places), dict(zip(SECTIONS, places, strict=True))


def test_neighbours_are_linked_from_both_ends(path):
    texts, i = markdown(read(path)), PATHS.index(path)
    for text in (texts[0], texts[-1]):
        for neighbour in PATHS[max(0, i - 1) : i] + PATHS[i + 1 : i + 2]:
            assert f"({neighbour.name})" in text
        assert "(README.md)" in text


def test_size_and_rhythm(path):
    book = read(path)
    kinds = [cell["cell_type"] for cell in book["cells"]]
    assert 30 <= len(kinds) <= 64
    assert kinds.count("markdown") >= kinds.count("code")
    assert max(len(list(run)) for kind, run in groupby(kinds) if kind == "code") <= 2
    longest = max((source(cell) for cell in code(book)), key=lambda text: len(text.splitlines()))
    assert len(longest.splitlines()) <= 25, longest
    assert max(len(line) for cell in code(book) for line in source(cell).splitlines()) <= 100
    assert path.stat().st_size <= 300_000


def test_outputs_come_from_one_clean_run(path):
    cells = [cell for cell in code(read(path)) if source(cell).strip()]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell["outputs"]:
            assert output["output_type"] != "error", source(cell)
            assert output.get("name") != "stderr", "".join(output.get("text", ""))[:200]


def test_outputs_say_nothing_of_the_machine_or_the_hour(path):
    for cell in code(read(path)):
        text = printed(cell)
        assert not MACHINE.search(text), f"{MACHINE.search(text)} in the output of:\n{source(cell)}"
        if "stored-times" not in cell["metadata"].get("tags", []):  # measured once, read from results/
            assert not TIMING.search(text), f"{TIMING.search(text)} in the output of:\n{source(cell)}"


def test_checked_outputs_hold_source_words_or_whole_numbers(path):
    """What nbval compares literally must be the same on every machine: no long decimals but those in source code."""
    checked = [cell for cell in code(read(path)) if "nbval-check-output" in cell["metadata"].get("tags", [])]
    assert any(re.search(r"\bshow\(", source(cell)) for cell in checked) or path.stem.startswith(("00", "11", "12"))
    for cell in checked:
        if not re.search(r"\bshow\(", source(cell)):
            assert not re.search(r"\d\.\d{4,}", printed(cell)), source(cell)


def test_links_and_pictures_are_in_the_repository(path):
    for text in markdown(read(path)):
        for alt, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text):
            if target.startswith(("http://", "https://")):
                assert not alt, f"a picture from the network: {target}"
            elif not target.startswith(("#", "attachment:")):
                assert (path.parent / target.split("#")[0]).exists(), target
        assert "<img" not in text and "data:image" not in text


def test_the_setup_comes_first_and_nothing_is_installed(path):
    cells = code(read(path))
    assert "setup" in cells[0]["metadata"].get("tags", [])
    for cell in cells:
        assert not re.search(r"^\s*[!%]|import \*|pip install", source(cell), re.M)
