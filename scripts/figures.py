"""Draw the committed pictures again from results/: `make figures`."""

from __future__ import annotations

from pathlib import Path

from lcqat_min.compare import read_results
from lcqat_min.report import picture

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    picture(read_results(ROOT / "results" / "compare.json"), ROOT / "figures" / "compare.svg")
    print("figures/compare.svg")
