"""lcqat-min: 2-bit vector-quantization-aware training of language models, small enough to read.

    from lcqat_min import LCQAT, TrainConfig, quantize, train, perplexity

Letters mean the same everywhere, here and in micro.py:

    W, W_hat     weight_of, QuantLinear.weight  [out, n]          a weight matrix, and what the layer multiplies by
    d, k         AffineCodebook.dim             integers          weights in a vector, digits in a vector
    A_l          TrellisCodebook.taps           [reach + 1, d, m] taps: each vector depends on the bits of later ones
    m            Codebook.bits                  integer           bits of a codebook index
    q            digits_of(index)               [..., k]          centred digits: -1, +1 or -1.5 ... +1.5
    A, b         AffineCodebook.A, .b           [d, k], [d]       the codebook: A q + b
    T            TableCodebook.table            [2^m, d]          the codebook that is a table
    v            AffineLinear.latent            [out, n k / d]    latents: what trains, and rounds to q
    D            QuantLinear.decoded            [out, n]          decoded weights, before scales and rotation
    r, c         row_scale, col_scale           [out], [n]        scales of the rows of codes, and of the inputs
    U            hadamard                       [B, B]            Hadamard matrix, for each block of B columns
    s_in, s_out  signs_in, signs_out            [n], [out]        random signs of the rotation
    H            Moments.H                      [n, n]            second moments of a layer's inputs
    C, L         Factor.C, feedback_of          [n, n]            Cholesky factor of H, and the feedback made of it

README.md says what is in which folder. Rounding, training and measuring need only torch and the standard library;
checkpoints need safetensors, and progress bars tqdm. With numpy, rounding is faster. micro.py is all of it in one file.
"""

import importlib.util
import os
import sys

if importlib.util.find_spec("torch") is None:  # with `name`, `python -m lcqat_min` says this in one line
    raise ModuleNotFoundError(
        f"lcqat_min needs torch, which {sys.executable} does not have. Set up .venv as README.md "
        "says and use the Python in there.",
        name=__name__,
    )

# Read once, when torch loads OpenMP: threads that wait for each other then sleep. By default they spin, and beside one
# other busy process a training step takes many times as long. What is set already stays as it is.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from .harness.evaluate import kl_to, perplexity  # noqa: E402
from .ptq.lcqat import LCQAT  # noqa: E402
from .ptq.model import quantize  # noqa: E402
from .ptq.trellis import Trellis  # noqa: E402
from .qat.config import TrainConfig  # noqa: E402
from .qat.loop import train  # noqa: E402

__all__ = ["LCQAT", "TrainConfig", "Trellis", "kl_to", "perplexity", "quantize", "train"]
__version__ = "0.2.0"
