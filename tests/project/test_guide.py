"""The instructor's guide is true: index and cards agree, tracks add up, links exist, its script does what it says.

pytest tests/project/test_guide.py
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
GUIDE = (FOLDER / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NOTEBOOK_LINK = re.compile(r"\(((\d\d)-[\w-]+\.ipynb)\)")
TRACKS = {"90 minutes": 90, "Half a day (210 minutes)": 210, "Two days (720 minutes)": 720}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
track = pytest.mark.parametrize("heading", TRACKS)


def markdown(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def card(text: str, row: str) -> str:
    """A row of the card at the top of a notebook."""
    return re.search(rf"^\| {row} \| (.*) \|$", text, re.M)[1]


def table(heading: str, level: str = "##") -> list[list[str]]:
    """Cells of the first table under a heading, without its head."""
    part = re.split(r"^#{2,3} ", GUIDE.split(f"\n{level} {heading}\n")[1], flags=re.M)[0]
    rows = re.findall(r"^\|(.*)\|$", re.search(r"^\|.*\n(\|.*(\n|$))+", part, re.M)[0], re.M)
    return [[cell.strip() for cell in row.split("|")] for row in rows[2:]]


def index() -> dict[str, list[str]]:
    """File name -> cells of its row: notebook, question, builds on, minutes to read, minutes of exercises."""
    return {NOTEBOOK_LINK.search(row[0])[1]: row for row in table("Index")}


def test_index_lists_every_notebook_once_in_order():
    links = [NOTEBOOK_LINK.search(row[0])[1] for row in table("Index")]
    assert links == [path.name for path in NOTEBOOKS]


@each
def test_index_gives_title_question_prerequisites_and_minutes_of_the_notebook(path):
    text = markdown(path)
    title, question, builds_on, reading, exercises = index()[path.name]
    assert title == f"[{re.search(r'^# (.*)$', text, re.M)[1]}]({path.name})"
    asked = re.search(r"^> \*\*Question\.\*\* ((?:.|\n> )*)", text, re.M)[1]
    assert question == " ".join(asked.replace("\n> ", " ").split())
    needed = sorted({number for _, number in NOTEBOOK_LINK.findall(card(text, "Builds on"))})
    assert builds_on == (", ".join(needed) or "-")
    assert reading == re.match(r"(\d+) minutes to read", card(text, "Time"))[1]
    minutes = re.findall(r"^### Exercise .*, (\d+) minutes\)$", text, re.M)
    assert int(exercises) == sum(map(int, minutes))


def test_nothing_builds_on_a_later_notebook():
    for name, row in index().items():
        assert all(number < name[:2] for number in re.findall(r"\d\d", row[2])), name


@track
def test_minutes_of_a_track_add_up(heading):
    minutes = [int(row[-1]) for row in table(heading, "###")]
    assert min(minutes) > 0 and sum(minutes) == TRACKS[heading]


@track
def test_a_track_begins_at_00_and_goes_forward(heading):
    order = [number for row in table(heading, "###") for _, number in NOTEBOOK_LINK.findall("|".join(row))]
    assert order[0] == "00" and order == sorted(set(order))


def test_two_days_of_equal_length_cover_every_notebook_in_its_reading_time():
    rows = table("Two days (720 minutes)", "###")
    for day in "12":
        assert sum(int(row[-1]) for row in rows if row[0] == day) == 360
    given = {NOTEBOOK_LINK.search(row[2])[1]: int(row[-1]) for row in rows if NOTEBOOK_LINK.search(row[2])}
    assert set(given) == set(index())
    for name, row in index().items():
        assert given[name] >= int(row[3]), f"{name} needs {row[3]} minutes to be read"


def test_marks_of_the_measured_times():
    assert GUIDE.count("<!-- times: start -->") == GUIDE.count("<!-- times: end -->") == 1
    times = GUIDE.split("<!-- times: start -->")[1].split("<!-- times: end -->")[0]
    assert [name for name, _ in NOTEBOOK_LINK.findall(times)] == sorted(index())


def test_links_exist():
    for target in re.findall(r"\]\(([^)\s]+)\)", GUIDE):
        if not target.startswith(("http://", "https://", "#")):
            assert (FOLDER / target).exists(), target


def test_commands_are_those_of_the_makefile():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for target in re.findall(r"`(?:[A-Z_]+=\S+ )*make ([a-z]+)", GUIDE):
        assert target in targets, target


def test_the_script_makes_a_version_without_solutions_and_outputs(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    for path in NOTEBOOKS[:1] + NOTEBOOKS[-1:]:
        (tmp_path / "notebooks" / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(re.search(r"```python\n(.*?)```", GUIDE, re.S)[1], "guide", "exec"), {})
    for path in NOTEBOOKS[:1] + NOTEBOOKS[-1:]:
        made = tmp_path / "student" / path.name
        text, original = markdown(made), markdown(path)
        assert "Solution</summary>" in original and "Solution</summary>" not in text
        assert text.count("Hint</summary>") == original.count("Hint</summary>")
        assert text.count("### Exercise") == original.count("### Exercise")
        cells = json.loads(made.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") for cell in cells)
        assert (tmp_path / "notebooks" / path.name).read_bytes() == path.read_bytes()


def test_run_times_are_those_that_were_measured():
    spec = importlib.util.spec_from_file_location("notebooks_script", ROOT / "scripts" / "notebooks.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    data = json.loads((ROOT / "results" / "notebooks.json").read_text(encoding="utf-8"))
    assert [row["notebook"] for row in data["rows"]] == [path.stem for path in NOTEBOOKS]
    assert script.times(data) in GUIDE
