"""Post-training quantization: quantize(model, batches, method), the start of training."""

from .allocate import allocate
from .lcqat import LCQAT, normal_codebook
from .ldlq import Rounded, ldlq_round, plain_round, proxy_loss, refit, round_matrix, row_scales
from .method import Method
from .model import LayerReport, quantize, weight_of
from .moments import Factor, Moments, factorize, second_moments
from .select import linear_layers
from .sweeps import swept
from .trellis import Trellis
from .viterbi import viterbi_round

__all__ = [
    "Factor",
    "LCQAT",
    "LayerReport",
    "Method",
    "Moments",
    "Rounded",
    "Trellis",
    "allocate",
    "factorize",
    "ldlq_round",
    "linear_layers",
    "normal_codebook",
    "plain_round",
    "proxy_loss",
    "quantize",
    "refit",
    "round_matrix",
    "row_scales",
    "second_moments",
    "swept",
    "viterbi_round",
    "weight_of",
]
