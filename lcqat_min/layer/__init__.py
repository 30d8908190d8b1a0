"""The layer: codes -> weight -> y, and the gradients through the rounding."""

from .linear import AffineLinear, QuantLinear, StepLinear, TableLinear, quant_layers, starting_latents
from .rotation import block_of, hadamard, mix, random_signs, rotate, unrotate
from .surrogate import ESTIMATORS, round_to_levels, sign_of, slope

__all__ = [
    "AffineLinear",
    "ESTIMATORS",
    "QuantLinear",
    "StepLinear",
    "TableLinear",
    "block_of",
    "hadamard",
    "mix",
    "quant_layers",
    "random_signs",
    "rotate",
    "round_to_levels",
    "sign_of",
    "slope",
    "starting_latents",
    "unrotate",
]
