"""The comparison: one small language model, several ways to quantize it to 2 bits, equal data, one table.

A *method* is a way to quantize and, for most, to train afterwards; a `Recipe` holds its settings. All methods see the
same calibration text, batches, order, number of steps and teacher. The learning rates of each trained method come from
one search of equal size (scripts/search_rates.py, on validation text); the table is measured on test text that neither
training nor the search has seen.

    perplexity   exp of the mean loss per token                       evaluate.perplexity
    KL           distance to the unquantized model, nats per token    evaluate.kl_to: on a small text it separates
                                                                      methods that perplexity does not

Each (method, seed) gives one row, written to <run>/compare.json as soon as it is known. A run that was interrupted goes
on when it is started again with the same --out: finished rows are kept, and a half-trained method continues from its
last checkpoint. A seed decides the calibration text, the random signs, the codebook fit and the order of the batches.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..packing.convert import to_storage_precision
from ..packing.size import bits_per_weight
from ..ptq.lcqat import LCQAT
from ..ptq.method import Method
from ..ptq.model import quantize
from ..ptq.trellis import Trellis
from ..qat.config import TrainConfig
from ..qat.loop import train
from ..systems.free_vq import FreeVQ
from ..systems.lsq import LSQ
from .batches import batches, longest_window, sample_windows
from .evaluate import kl_to, perplexity
from .generate import continue_prompt
from .text import Splits


@dataclass(frozen=True)
class Recipe:
    """The settings of a method.

    quant: None leaves the model unquantized. rates: learning rates of TrainConfig; None does not train. teacher: train
    on the unquantized model's predictions, else on next tokens. by_default: part of the comparison without being named.
    """

    name: str
    what: str
    quant: Method | None
    rates: dict[str, Any] | None = None
    teacher: bool = True
    by_default: bool = True


_SCALAR = LCQAT(codebook="scalar", rotate="none")

RECIPES = (
    Recipe("fp", "unquantized; the control trains on, on next tokens", None, {"lr_rest": 5e-4}, teacher=False),
    Recipe("rtn", "scalar, rounded plainly", replace(_SCALAR, feedback=False)),
    Recipe("gptq", "scalar, rounded with error feedback and sweeps", _SCALAR),
    Recipe(
        "sq-paretoq",
        "scalar QAT from its published start: step = row maximum / 2",
        LSQ(feedback=False, scale="max"),
        {"lr_latents": 0.003, "lr_scales": 0.01, "lr_codebooks": 0.01},
    ),
    Recipe(
        "sq",
        "scalar QAT from the start with error feedback",
        LSQ(),
        {"lr_latents": 0.01, "lr_scales": 0.003, "lr_codebooks": 0.003},
    ),
    Recipe(
        "lcqat-release",
        "scalar grid, rotated, frozen codebook, DGE gradient",
        LCQAT(codebook="scalar", learn_codebook=False, estimator="dge", start_on_codes=True),
        {"lr_latents": 0.003, "lr_scales": 0.003, "lr_codebooks": 0.003},
    ),
    Recipe(
        "lcqat-paper",
        "4-D integer lattice, rotated, A and b learned",
        LCQAT(codebook="lattice"),
        {"lr_latents": 0.01, "lr_scales": 0.001, "lr_codebooks": 0.001},
    ),
    Recipe(
        "lcqat-planes",
        "untied bit-planes, rotated, A and b learned",
        LCQAT(),
        {"lr_latents": 0.01, "lr_scales": 0.003, "lr_codebooks": 0.003},
    ),
    Recipe(
        "lcqat-trellis",
        "vectors that overlap: 4 taps, 64 states, rotated, taps learned",
        Trellis(),
        {"lr_latents": 0.001, "lr_scales": 0.003, "lr_codebooks": 0.003},
    ),
    Recipe(
        "lcqat-planes8",  # with the rates of lcqat-planes
        "untied bit-planes for 8 weights, 65,536 codewords; slow to round",
        LCQAT(dim=8),
        {"lr_latents": 0.01, "lr_scales": 0.003, "lr_codebooks": 0.003},
        by_default=False,
    ),
    Recipe(
        "free-vq",
        "256-entry table, rotated, codes frozen, table learned",
        FreeVQ(),
        {"lr_scales": 0.0015, "lr_codebooks": 0.0015},
    ),
)


@dataclass(frozen=True)
class Budget:
    """What every method gets, in tokens; `window` tokens per sequence, `batch` sequences per step."""

    train_tokens: int = 61_440
    calibration_tokens: int = 32_768
    eval_tokens: int = 16_384
    window: int = 256
    batch: int = 4

    @property
    def steps(self) -> int:
        """Optimizer steps that the training tokens allow, at least 1."""
        return max(1, self.train_tokens // (self.window * self.batch))


@dataclass(frozen=True)
class Experiment:
    """What all methods share: the unquantized model, the text and the budget."""

    teacher: nn.Module
    tokenizer: Any
    text: Splits
    budget: Budget
    device: torch.device

    def calibration(self, seed: int) -> list[Tensor]:
        """Calibration batches [8, window] of a seed."""
        b = self.budget
        count = max(1, b.calibration_tokens // b.window)
        return list(sample_windows(self.text.train, count, b.window, torch.Generator().manual_seed(seed)).split(8))

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Training batches [batch, window] in the order of a seed."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return batches(self.text.train, self.budget.window, self.budget.batch, generator)

    def score(self, model: nn.Module) -> tuple[float, float]:
        """Perplexity, and KL to the unquantized model in nats per token, on the test text."""
        ids, window = self.text.test[: self.budget.eval_tokens], self.budget.window
        return perplexity(model, ids, window).value, kl_to(self.teacher, model, ids, window)


def quantized(experiment: Experiment, recipe: Recipe, seed: int) -> nn.Module:
    """A copy of the unquantized model, quantized but not yet trained, in the precision of its file."""
    model = copy.deepcopy(experiment.teacher)
    if recipe.quant is not None:
        quantize(model, experiment.calibration(seed), recipe.quant, seed=seed)
        to_storage_precision(model)
    return model


def run_recipe(
    experiment: Experiment,
    recipe: Recipe,
    seed: int,
    ppl_fp: float,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[dict, nn.Module, list[dict]]:
    """Quantize, score, train, score: the row of the results, the model and the training history.

    The model is scored with 16-bit scales and codebooks, as they are counted and as its file will hold them.
    """
    clock = time.perf_counter()
    model = quantized(experiment, recipe, seed)
    row = {"method": recipe.name, "seed": seed, "bits_per_weight": bits_per_weight(model).per_weight, "ppl_fp": ppl_fp}
    row["seconds_ptq"] = time.perf_counter() - clock
    row["ppl_ptq"], row["kl_ptq"] = experiment.score(model)
    history: list[dict] = []
    row |= {"ppl_qat": None, "kl_qat": None, "code_flips": None, "tokens": 0, "seconds_qat": 0.0}
    if recipe.rates is not None:
        clock = time.perf_counter()
        config = TrainConfig(steps=experiment.budget.steps, **recipe.rates)
        teacher = experiment.teacher if recipe.teacher else None
        history = train(model, experiment.batches(seed), config, teacher, checkpoint=checkpoint, on_step=on_step)
        row["seconds_qat"] = time.perf_counter() - clock
        to_storage_precision(model)
        row["ppl_qat"], row["kl_qat"] = experiment.score(model)
        row["code_flips"], row["tokens"] = history[-1]["flips"], history[-1]["tokens"]
    return row | {"peak_mb": peak_mb(experiment.device)}, model, history


def continue_text(experiment: Experiment, model: nn.Module, prompt: str, tokens: int = 40) -> str:
    """Greedy continuation of a prompt."""
    _, new = continue_prompt(model, experiment.tokenizer, prompt, tokens)
    return experiment.tokenizer.decode(new, skip_special_tokens=True)


def fitting(budget: Budget, model: nn.Module, text: Splits) -> Budget:
    """The budget, reduced to the windows that the model can read and to the text that there is.

    UsageError for a text without one training batch.
    """
    window = min(budget.window, longest_window(model) or budget.window)
    if len(text.train) < window * budget.batch:
        raise UsageError(
            f"the text {text.source!r} has {len(text.train)} training tokens, and one step takes "
            f"{window * budget.batch}: give a longer text"
        )
    calibration, scored = min(budget.calibration_tokens, len(text.train)), min(budget.eval_tokens, len(text.test))
    return replace(budget, window=window, calibration_tokens=calibration, eval_tokens=scored)


def settings(recipes: Sequence[Recipe], budget: Budget, model: str, text: str, prompt: str, digest: str) -> dict:
    """All that decides a result, as plain JSON values. digest: of the text's token ids, Splits.digest."""
    found = {
        "model": model,
        "text": text,
        "text_digest": digest,
        "budget": asdict(budget),
        "prompt": prompt,
        "methods": {recipe.name: asdict(recipe) for recipe in recipes},
    }
    return json.loads(json.dumps(found))


def made_with(experiment: Experiment) -> dict:
    """Settings of the other results (rates, ablations): the budget and the text."""
    text = experiment.text
    return {"budget": asdict(experiment.budget), "text": text.source, "text_digest": text.digest}


def peak_mb(device: torch.device) -> float | None:
    """Peak memory of the process so far (CPU) or of the allocator (CUDA), MB; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
