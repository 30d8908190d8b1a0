"""Text, models, evaluation and the comparison: what all methods are measured with."""

from .code_stats import CodeStats, code_stats, indices_of
from .compare import ARMS, Budget, Lab, start
from .evaluate import Perplexity, kl_to, perplexity, perplexity_and_kl
from .models import BUNDLED, choose_device, load
from .report import by_arm, caption, spread, table
from .results import read_results
from .text import Splits, batches, load_text, sample_windows, windows

__all__ = [
    "ARMS",
    "BUNDLED",
    "Budget",
    "CodeStats",
    "Lab",
    "Perplexity",
    "Splits",
    "batches",
    "by_arm",
    "caption",
    "choose_device",
    "code_stats",
    "indices_of",
    "kl_to",
    "load",
    "load_text",
    "perplexity",
    "perplexity_and_kl",
    "read_results",
    "sample_windows",
    "spread",
    "start",
    "table",
    "windows",
]
