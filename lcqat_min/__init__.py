"""lcqat-min: 2-bit vector-quantization-aware training of language models, small enough to read.

    from lcqat_min import QuantConfig, TrainConfig, quantize, train, perplexity

The core (constants, digits, codebook, search, lloyd, rotate, rounding, calibrate, feedback, ptq, linear, convert,
checkpoint, train, evaluate) needs torch and the standard library alone, and safetensors when a checkpoint is written.
"""

from .convert import quantize
from .evaluate import kl_to, perplexity
from .ptq import QuantConfig
from .train import TrainConfig, train

__all__ = ["QuantConfig", "TrainConfig", "kl_to", "perplexity", "quantize", "train"]
__version__ = "0.1.0"
