"""What the notebooks share: one look for pictures, module source on the page, checks for the exercises.

    from course import COLOURS, check, picture, seeded, show

Nothing here is needed to quantize a model: that is `lcqat_min`, next door.
"""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

import lcqat_min  # noqa: F401  before torch: it asks threads that wait to sleep, which busy laptops need

import torch  # isort: skip

from .exercise import check

__all__ = ["COLOURS", "FIGURES", "ROOT", "check", "picture", "seeded", "show"]

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are text here

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "figures"

# One colour for each kind of codebook, in every notebook; black and greys for all else. Their grey values differ as
# well: 0.10, 0.30, 0.40, 0.45, 0.60, 0.75.
COLOURS = {
    "untied": "#0b1d51",  # bit-planes, ours
    "tied": "#8c2d04",  # the paper's lattice
    "trellis": "#a53f9b",  # vectors that overlap
    "table": "#2a8078",  # lookup table
    "scalar": "#dd8452",  # one weight at a time
    "plain": "#bdbdbd",  # unquantized weights, references
}

plt.rcParams.update(
    {
        "figure.figsize": (7.0, 3.6),
        "figure.dpi": 90,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "legend.frameon": False,
        "svg.hashsalt": "lcqat-min",  # the same picture is the same file
        "svg.fonttype": "path",
    }
)
matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=list(COLOURS.values()))


def seeded(seed: int) -> torch.Generator:
    """A generator of its own for whatever is drawn at random: the same numbers on every run."""
    return torch.Generator().manual_seed(seed)


def picture(name: str) -> None:
    """Show the current figure; with LCQAT_FIGURES=1 (`make figures`) also write it to figures/<name>.svg."""
    plt.tight_layout()
    if os.environ.get("LCQAT_FIGURES") == "1":
        target, part = FIGURES / f"{name}.svg", FIGURES / f"{name}.part.svg"
        plt.savefig(part, metadata={"Date": None})
        os.replace(part, target)
    plt.show()


def show(*things: object) -> None:
    """Print the source of functions, classes or modules: what you read is what runs."""
    for thing in things:
        print(inspect.getsource(thing).rstrip() + "\n")
