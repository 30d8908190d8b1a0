"""Draw the committed pictures again from results/: `make figures`."""

from __future__ import annotations

from pathlib import Path

from lcqat_min.compare import read_results
from lcqat_min.report import picture, tokens_picture

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    for results, draw in (("compare", picture), ("tokens", tokens_picture)):
        if (ROOT / "results" / f"{results}.json").exists():
            draw(read_results(ROOT / "results" / f"{results}.json"), ROOT / "figures" / f"{results}.svg")
            print(f"figures/{results}.svg")
