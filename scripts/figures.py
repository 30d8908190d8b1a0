"""Draw the committed pictures again from results/: `make figures`."""

from __future__ import annotations

from pathlib import Path

from lcqat_min.harness.report import picture
from lcqat_min.harness.results import read_results

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    picture(read_results(ROOT / "results" / "compare.json"), ROOT / "figures" / "compare.svg")
    print("figures/compare.svg")
