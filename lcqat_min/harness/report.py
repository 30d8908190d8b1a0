"""From results to what people read: a table, a picture, and the table inside the README.

Every number shown comes from the rows of a results file; several seeds are shown as mean and range (least to most). The
README holds its table between two marks, written by `renew_readme`; a test compares the two.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .results import difference

START, END = "<!-- compare: table -->", "<!-- compare: end -->"
COLOURS = {"ptq": "#9aa5b1", "qat": "#1b6ca8"}  # told apart in grey as well
YTICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


def by_arm(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Rows grouped by arm, in the order of the first seed."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["arm"], []).append(row)
    return groups


def spread(rows: list[dict], key: str) -> tuple[float, float, float] | None:
    """Mean, least and most of a field over seeds; None where it was not measured."""
    values = [row[key] for row in rows if row[key] is not None]
    return (sum(values) / len(values), min(values), max(values)) if values else None


def cell(rows: list[dict], key: str, form: str) -> str:
    """`mean (least to most)` of a field, `mean` for one seed, `-` where it was not measured."""
    if (values := spread(rows, key)) is None:
        return "-"
    mean, least, most = (format(value, form) for value in values)
    return mean if len(rows) == 1 else f"{mean} ({least} to {most})"


def table(data: dict) -> str:
    """Markdown table of a results file, one line per arm."""
    head = ["arm", "what", "bits a weight", "perplexity, PTQ", "perplexity, QAT", "KL, PTQ", "KL, QAT", "codes flipped"]
    what = {name: arm["what"] for name, arm in data["meta"]["config"]["arms"].items()}
    lines = [head, ["---"] * len(head)]
    for arm, rows in by_arm(data["rows"]).items():
        lines.append(
            [
                f"`{arm}`",
                what[arm],
                cell(rows[:1], "bits_per_weight", ".3f"),
                cell(rows, "ppl_ptq", ".2f"),
                cell(rows, "ppl_qat", ".2f"),
                cell(rows, "kl_ptq", ".4f"),
                cell(rows, "kl_qat", ".4f"),
                cell(rows, "code_flips", ".1%"),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def caption(data: dict) -> str:
    """What the table was made of, in one line."""
    config, meta = data["meta"]["config"], data["meta"]
    seeds, budget = sorted({row["seed"] for row in data["rows"]}), config["budget"]
    tokens = max(row["tokens"] for row in data["rows"])
    digest = f" ({config['text_digest']})" if config.get("text_digest") else ""
    return (
        f"Model `{config['model']}`, text `{config['text']}`{digest}, {tokens:,} training tokens an arm, "
        f"{budget['calibration_tokens']:,} for calibration, {budget['eval_tokens']:,} of test text, windows of "
        f"{budget['window']}; seeds {', '.join(map(str, seeds))}: mean (least to most); KL in nats a token to the "
        f"unquantized model. Made on {meta['date']} with torch {meta['versions']['torch']} on "
        f"{meta['machine']['cores']} CPU cores, {meta['machine']['processor']}."
    )


def beside(new: dict, committed: dict | None) -> str:
    """The figures of a run for the terminal, next to the committed ones if those are of the same model and budget."""
    why = "there are none here" if committed is None else _unlike(new, committed)
    old = {} if why else by_arm(row for row in committed["rows"] if _same_arm(row["arm"], new, committed))
    names = ("arm", "bits", "now", "committed", "now", "committed", "perplexity", "seconds")
    widths = "{:<15}{:>6}{:>9} {:<27}{:>9} {:<27}{:>11}{:>9}"
    if why:
        names, widths = (*names[:3], *names[4:5], *names[6:]), "{:<15}{:>6}{:>16}{:>16}{:>11}{:>9}"
    wide = 16 if why else 37
    lines = [f"{'':<21}{'KL after PTQ':^{wide}}{'KL after QAT':^{wide}}".rstrip(), widths.format(*names)]
    for arm, rows in by_arm(new["rows"]).items():
        cells = [arm, f"{rows[0]['bits_per_weight']:.3f}"]
        for key in ("kl_ptq", "kl_qat"):
            now = spread(rows, key)
            cells.append("-" if now is None else f"{now[0]:.4f}")
            cells += [] if why else [cell(old[arm], key, ".4f") if arm in old else "-"]
        last = spread(rows, "ppl_qat") or spread(rows, "ppl_ptq")
        seconds = sum(row["seconds_ptq"] + row["seconds_qat"] for row in rows) / len(rows)
        lines.append(widths.format(*cells, f"{last[0]:.2f}", f"{seconds:.0f}"))
    lines.append(f"No committed figures beside these: {why}." if why else _which_text(new, committed))
    return "\n".join(lines).rstrip()


def _unlike(new: dict, committed: dict) -> str:
    """Why the committed figures are no match for those of a run, in words; "" if they are."""
    now, then = (
        {"model": c["model"], "text": c["text"], **c["budget"]}
        for c in (data["meta"]["config"] for data in (new, committed))
    )
    return difference(then, now)


def _same_arm(name: str, new: dict, committed: dict) -> bool:
    now, then = (data["meta"]["config"]["arms"] for data in (new, committed))
    return now.get(name) == then.get(name)


def _which_text(new: dict, committed: dict) -> str:
    """Whether the committed figures were made with the very same text; "" if they were."""
    now, then = (data["meta"]["config"].get("text_digest") for data in (new, committed))
    if then is None:
        return "The committed results do not say which text they were made with; figures may differ for that reason."
    if now != then:
        return f"This is another text than the committed one ({now}, not {then}): figures differ for that reason."
    return ""


def picture(data: dict, path: Path) -> None:
    """Dot plot, one line per arm; from the open dot (after PTQ) to the full dot (after QAT); bars span the seeds."""
    from matplotlib.figure import Figure  # without pyplot, whose backend belongs to the caller

    groups = {arm: rows for arm, rows in by_arm(data["rows"]).items() if arm != "fp"}
    fig = Figure(figsize=(8, 0.46 * len(groups) + 1.7), layout="constrained")
    ax = fig.subplots()
    for y, rows in enumerate(reversed(groups.values())):
        before, after = spread(rows, "kl_ptq"), spread(rows, "kl_qat")
        ax.plot(before[1:], [y, y], color=COLOURS["ptq"], lw=6, alpha=0.5, solid_capstyle="butt")
        ax.plot(before[0], y, "o", mfc="white", mec=COLOURS["ptq"], mew=2, ms=9)
        if after is None:
            ax.annotate(
                f"{before[0]:.3f}",
                (before[0], y),
                (9, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color="#52606d",
            )
            continue
        ax.annotate(
            "",
            (after[0], y),
            (before[0], y),
            arrowprops={"arrowstyle": "-", "color": COLOURS["qat"], "lw": 1.2, "shrinkA": 6, "shrinkB": 5},
        )
        ax.plot(after[1:], [y, y], color=COLOURS["qat"], lw=6, alpha=0.4, solid_capstyle="butt")
        ax.plot(after[0], y, "o", color=COLOURS["qat"], ms=9)
        ax.annotate(
            f"{after[0]:.3f}",
            (after[0], y),
            (-9, 0),
            textcoords="offset points",
            va="center",
            ha="right",
            fontsize=8.5,
            color=COLOURS["qat"],
        )
    _finish(ax, data, list(reversed(groups)))
    _save(fig, path)


def _save(fig, path: Path) -> None:
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("part-" + path.name)
    with matplotlib.rc_context({"svg.hashsalt": "lcqat-min"}):  # same data, same file
        fig.savefig(temporary, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=160)
    os.replace(temporary, path)


def _finish(ax, data: dict, names: list[str]) -> None:
    import matplotlib.ticker as ticker
    from matplotlib.lines import Line2D

    values = [
        row[key] for row in data["rows"] if row["arm"] != "fp" for key in ("kl_ptq", "kl_qat") if row[key] is not None
    ]
    ax.set_xscale("log")
    ax.set_xlim(min(values) / 1.5, max(values) * 1.3)
    ax.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    ax.set_xticks([t for t in YTICKS if min(values) / 1.5 <= t <= max(values) * 1.3])
    ax.set_yticks(range(len(names)), names, family="monospace")
    ax.set_ylim(-0.7, len(names) - 0.3)
    ax.grid(axis="x", color="#e4e7eb")
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("distance to the unquantized model: KL, nats a token (log scale; further left is better)")
    ax.set_title("What 2 bits cost a small language model, and what training brings back", loc="left", fontsize=11.5)
    ax.legend(
        handles=[
            Line2D(
                [], [], marker="o", ls="", mfc="white", mec=COLOURS["ptq"], mew=2, ms=8, label="after rounding (PTQ)"
            ),
            Line2D([], [], marker="o", ls="", color=COLOURS["qat"], ms=8, label="after training (QAT)"),
        ],
        loc="upper left",
        bbox_to_anchor=(0, 0.99),
        frameon=False,
        fontsize=8.5,
    )


def readme_block(data: dict) -> str:
    """Table and caption as they stand in the README between START and END."""
    return f"{START}\n{table(data)}\n\n{caption(data)}\n{END}"


def renew_readme(data: dict, path: Path) -> None:
    """Replace the block between the marks in a Markdown file; ValueError if the marks are missing."""
    text = path.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise ValueError(f"{path} lacks the marks {START} and {END} that hold the table")
    before, after = text.split(START)[0], text.split(END)[1]
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(before + readme_block(data) + after, encoding="utf-8")
    os.replace(temporary, path)
