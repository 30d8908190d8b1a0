"""Text, models, evaluation and the comparison: what all methods are measured with."""

from .batches import batches, sample_windows, windows
from .code_stats import CodeStats, code_stats, indices_of
from .compare import RECIPES, Budget, Experiment, Recipe, quantized, run_recipe
from .evaluate import Perplexity, kl_to, perplexity
from .models import BUNDLED, choose_device, load
from .report import by_method, caption, spread, table
from .results import read_results
from .text import Splits, load_text

__all__ = [
    "BUNDLED",
    "Budget",
    "CodeStats",
    "Experiment",
    "Perplexity",
    "RECIPES",
    "Recipe",
    "Splits",
    "batches",
    "by_method",
    "caption",
    "choose_device",
    "code_stats",
    "indices_of",
    "kl_to",
    "load",
    "load_text",
    "perplexity",
    "quantized",
    "read_results",
    "run_recipe",
    "sample_windows",
    "spread",
    "table",
    "windows",
]
