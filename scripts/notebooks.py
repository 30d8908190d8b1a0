"""Run the notebooks from top to bottom and store their outputs: `make notebooks`, or some of them by name.

    python scripts/notebooks.py                 all of them, in order
    python scripts/notebooks.py 02 05           only these
    python scripts/notebooks.py --slides        HTML slides of all, from the slide types in the cells' metadata

Each runs in a kernel of its own, offline, in its own folder. A notebook is replaced only after all of its cells have
run; what is not the same on each run (times, machine) is left out of it. How long each took goes to
results/notebooks.json and into the instructor's guide.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from lcqat_min.disk.whole_file import whole_file
from lcqat_min.harness.results import describe, read_results, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "notebooks.json"
GUIDE = ROOT / "notebooks" / "README.md"
START, END = "<!-- times: start -->", "<!-- times: end -->"
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(path: Path) -> float:
    """Execute a notebook and store it with its outputs; seconds taken."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(path, as_version=4)
    clock = time.perf_counter()
    where = {"metadata": {"path": path.parent}}
    NotebookClient(book, timeout=600, kernel_name="python3", coalesce_streams=True, resources=where).execute()
    seconds = time.perf_counter() - clock
    for place, cell in enumerate(book.cells):
        cell.id = f"c{place:02d}"
        cell.metadata.pop("execution", None)  # time stamps
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    with whole_file(path) as part:
        nbformat.write(book, part)
    return seconds


def times(data: dict) -> str:
    """What the guide says of run times: a table between marks, from results/notebooks.json."""
    machine = data["meta"]["machine"]
    lines = ["| notebook | seconds to run |", "|---|---|"]
    lines += [f"| [{row['notebook'][:2]}]({row['notebook']}.ipynb) | {row['seconds']:.0f} |" for row in data["rows"]]
    where = f"Measured on {data['meta']['date']} on {machine['cores']} CPU cores ({machine['processor']}), no GPU."
    return f"{START}\n" + "\n".join(lines) + f"\n\n{where}\n{END}"


def renew_guide(data: dict) -> None:
    """Put the run times into the guide."""
    text = GUIDE.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    with whole_file(GUIDE) as part:
        part.write_text(before + times(data) + after, encoding="utf-8")


def slides(paths: list[Path]) -> None:
    """One HTML file of slides for each notebook, in runs/slides/."""
    from nbconvert import SlidesExporter

    target = ROOT / "runs" / "slides"
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        html, _ = SlidesExporter(exclude_input=True).from_filename(str(path))
        (target / f"{path.stem}.html").write_text(html, encoding="utf-8")
    print(f"{len(paths)} decks are in {target.relative_to(ROOT)}/; a browser shows them, with reveal.js from the net.")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", help="how the files' names begin (default: all)")
    options.add_argument("--slides", action="store_true", help="write slides instead of running")
    args = options.parse_args()
    names = tuple(args.names) or ("",)
    paths = [path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if path.name.startswith(names)]
    if not paths:
        sys.exit(f"no notebook in notebooks/ begins with {' or '.join(names)}")
    if args.slides:
        return slides(paths)
    os.environ.update(QUIET)
    for path in paths:
        seconds = run(path)
        print(f"{path.stem:<30}{seconds:6.0f} s", flush=True)
        rows = read_results(RESULTS)["rows"] if RESULTS.exists() else []
        rows = [row for row in rows if row["notebook"] != path.stem] + [{"notebook": path.stem, "seconds": seconds}]
        data = {"meta": describe({}), "rows": sorted(rows, key=lambda row: row["notebook"])}
        write_json(RESULTS, data)
        renew_guide(data)


if __name__ == "__main__":
    main()
