"""From results to what people read: a table, a picture, and the table inside the README.

Every number shown comes from the rows of a results file; several seeds are shown as mean and range. The README holds
its table between two marks, written by `renew_readme`; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..disk.whole_file import whole_file
from ..errors import UsageError
from .results import difference

START, END = "<!-- compare: table -->", "<!-- compare: end -->"
GREY, BLUE = "#9aa5b1", "#1b6ca8"  # they differ when printed in grey, too
DOTS: dict[str, dict[str, Any]] = {
    "kl_ptq": {"mfc": "white", "mec": GREY, "mew": 2, "label": "after rounding (PTQ)"},
    "kl_qat": {"mfc": BLUE, "mec": BLUE, "mew": 2, "label": "after training (QAT)"},
}


def by_method(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Rows grouped by method, in the order of the first seed."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    return groups


def spread(rows: list[dict], key: str) -> tuple[float, float, float] | None:
    """Mean, minimum and maximum of a field over seeds; None where it was not measured."""
    values = [row[key] for row in rows if row[key] is not None]
    return (sum(values) / len(values), min(values), max(values)) if values else None


def cell(rows: list[dict], key: str, form: str) -> str:
    """`mean (minimum to maximum)` of a field, `mean` for one seed, `-` where it was not measured."""
    if (values := spread(rows, key)) is None:
        return "-"
    mean, low, high = (format(value, form) for value in values)
    return mean if len(rows) == 1 else f"{mean} ({low} to {high})"


def table(data: dict) -> str:
    """Markdown table of a results file, one line per method."""
    columns = {
        "perplexity, PTQ": ("ppl_ptq", ".2f"),
        "perplexity, QAT": ("ppl_qat", ".2f"),
        "KL, PTQ": ("kl_ptq", ".4f"),
        "KL, QAT": ("kl_qat", ".4f"),
        "codes flipped": ("code_flips", ".1%"),
    }
    lines = [["method", "what", "bits per weight", *columns], ["---"] * (3 + len(columns))]
    for method, rows in by_method(data["rows"]).items():
        what = data["meta"]["config"]["methods"][method]["what"]
        bits = cell(rows[:1], "bits_per_weight", ".3f")
        lines.append([f"`{method}`", what, bits, *(cell(rows, *column) for column in columns.values())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def caption(data: dict) -> str:
    """What the table was made of, in one line."""
    config, meta = data["meta"]["config"], data["meta"]
    seeds, budget = sorted({row["seed"] for row in data["rows"]}), config["budget"]
    tokens = max(row["tokens"] for row in data["rows"])
    return (
        f"Model `{config['model']}`, text `{config['text']}` ({config['text_digest']}), {tokens:,} training tokens per "
        f"method, {budget['calibration_tokens']:,} for calibration, {budget['eval_tokens']:,} of test text, windows of "
        f"{budget['window']}; seeds {', '.join(map(str, seeds))}: mean (minimum to maximum); KL in nats per token to "
        f"the unquantized model. Made on {meta['date']} with torch {meta['versions']['torch']} on "
        f"{meta['machine']['cores']} CPU cores, {meta['machine']['processor']}."
    )


def beside(new: dict, committed: dict | None) -> str:
    """The figures of a run for the terminal, beside committed ones of the same model, text, budget and recipe."""
    now, then = new["meta"]["config"], (committed or new)["meta"]["config"]
    why = "there are none here" if committed is None else difference(_shared(then), _shared(now))
    old = {} if why or committed is None else by_method(committed["rows"])
    line = "{:<15}{:>6}{:>9}  {:<26}{:>9}  {:<26}{:>11}{:>9}".format
    lines = [line("method", "bits", "KL, PTQ", "committed", "KL, QAT", "committed", "perplexity", "seconds")]
    for method, rows in by_method(new["rows"]).items():
        theirs = old.get(method, []) if now["methods"][method] == then["methods"].get(method) else []
        cells = [method, cell(rows[:1], "bits_per_weight", ".3f")]
        for key in DOTS:
            ours = spread(rows, key)
            cells += [f"{ours[0]:.4f}" if ours else "-", cell(theirs, key, ".4f")]
        last = spread(rows, "ppl_qat") or spread(rows, "ppl_ptq") or (math.nan,) * 3
        seconds = sum(row["seconds_ptq"] + row["seconds_qat"] for row in rows) / len(rows)
        lines.append(line(*cells, f"{last[0]:.2f}", f"{seconds:.0f}"))
    if why:
        lines.append(f"No committed figures beside these: {why}.")
    elif (own := now["text_digest"]) != (other := then["text_digest"]):
        lines.append(
            f"This is another text than the committed one ({own}, not {other}): figures differ for that reason."
        )
    return "\n".join(lines)


def _shared(config: dict) -> dict:
    """The settings that two runs must share for their figures to be compared, except the digest of the text."""
    return {"model": config["model"], "text": config["text"], **config["budget"]}


def picture(data: dict, path: Path) -> None:
    """Dot plot, one line per method: from the open dot (after PTQ) to the full dot (after QAT); bars span the seeds."""
    from matplotlib.figure import Figure  # without pyplot, whose backend belongs to the caller

    groups = {method: rows for method, rows in by_method(data["rows"]).items() if method != "fp"}
    fig = Figure(figsize=(8, 0.46 * len(groups) + 1.7), layout="constrained")
    ax = fig.subplots()
    for y, rows in enumerate(reversed(groups.values())):
        found = {key: seen for key in DOTS if (seen := spread(rows, key))}
        ax.plot([mean for mean, _, _ in found.values()], [y] * len(found), color=BLUE, lw=1.2)
        for key, (mean, low, high) in found.items():
            ax.plot((low, high), (y, y), color=DOTS[key]["mec"], lw=6, alpha=0.45, solid_capstyle="butt")
            ax.plot(mean, y, "o", ms=8, **DOTS[key])
        last: dict[str, Any] = {"textcoords": "offset points", "va": "center", "ha": "right", "fontsize": 8.5}
        ax.annotate(f"{mean:.3f}", (mean, y), (-9, 0), **last)
    ax.set_yticks(range(len(groups)), reversed(groups), family="monospace")
    ax.set_ylim(-0.7, len(groups) - 0.3)
    _finish(ax)
    _save(fig, path)


def _finish(ax) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    ax.margins(x=0.12)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="x", color="#e4e7eb")
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("distance to the unquantized model: KL, nats per token (log scale; further left is better)")
    ax.set_title("What 2 bits cost a small language model, and what training brings back", loc="left", fontsize=11.5)
    dots = [Line2D([], [], marker="o", ls="", ms=8, **style) for style in DOTS.values()]
    ax.legend(handles=dots, loc="upper left", frameon=False, fontsize=8.5)


def _save(fig, path: Path) -> None:
    import matplotlib

    with whole_file(path) as part, matplotlib.rc_context({"svg.hashsalt": "lcqat-min"}):  # same data, same file
        fig.savefig(part, metadata={"Date": None})


def readme_block(data: dict) -> str:
    """Table and caption as they stand in the README between START and END."""
    return f"{START}\n{table(data)}\n\n{caption(data)}\n{END}"


def renew_readme(data: dict, path: Path) -> None:
    """Replace the block between the marks in a Markdown file; UsageError if the marks are missing."""
    text = path.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise UsageError(f"{path} lacks the marks {START} and {END} that hold the table")
    before, after = text.split(START)[0], text.split(END)[1]
    with whole_file(path) as part:
        part.write_text(before + readme_block(data) + after, encoding="utf-8")
