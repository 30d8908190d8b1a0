"""Post-training quantization: quantize(model, batches), the start of training."""

from .ldlq import Rounded, feedback_round, plain_round, proxy_loss, refit, round_matrix, row_scales
from .matrix import QuantConfig, normal_codebook
from .model import quant_layers, quantize, weight_of
from .moments import Factor, Moments, factorize, second_moments
from .select import linear_layers

__all__ = [
    "Factor",
    "Moments",
    "QuantConfig",
    "Rounded",
    "factorize",
    "feedback_round",
    "linear_layers",
    "normal_codebook",
    "plain_round",
    "proxy_loss",
    "quant_layers",
    "quantize",
    "refit",
    "round_matrix",
    "row_scales",
    "second_moments",
    "weight_of",
]
