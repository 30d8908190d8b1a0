"""The layer: codes -> weight -> y, and the gradients through the rounding."""

from .linear import AffineLinear, QuantLinear, in_units, quant_layers, root_mean_square, starting_latents
from .rotation import block_of, hadamard, mix, random_signs, rotate, unrotate
from .surrogate import ESTIMATORS, round_to_levels, sign_of, slope

__all__ = [
    "AffineLinear",
    "ESTIMATORS",
    "QuantLinear",
    "block_of",
    "hadamard",
    "in_units",
    "mix",
    "quant_layers",
    "random_signs",
    "root_mean_square",
    "rotate",
    "round_to_levels",
    "sign_of",
    "slope",
    "starting_latents",
    "unrotate",
]
