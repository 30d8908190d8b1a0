"""The main job: one small language model, every way to 2 bits, equal data, one table.

An *arm* is a way to quantize and, for most, to train after. All arms see the same calibration text, batches, order,
steps and teacher. Learning rates come from one search of equal size for each trained arm (scripts/search_rates.py,
on validation text); the table is measured on test text that neither training nor the search has seen.

    perplexity   exp of the mean loss per token                        evaluate.perplexity
    KL           distance to the unquantized model, nats per token     evaluate.kl_to: tells arms apart that
                                                                       perplexity on a small text cannot

Each (arm, seed) gives one row, written to <run>/compare.json as soon as it is known (a temporary file, renamed). A run
that was interrupted goes on with `--resume <run>`: finished rows are kept and a half-trained arm continues from its
last checkpoint. A seed decides the calibration text, the random signs, the codebook fit and the order of the batches.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..language_model import longest_window
from ..packing.convert import to_storage_precision
from ..packing.size import bits_per_weight
from ..ptq.lcqat import LCQAT
from ..ptq.method import Method
from ..ptq.model import quantize
from ..qat.config import TrainConfig
from ..qat.loop import train
from ..systems.free_vq import FreeVQ
from ..systems.lsq import LSQ
from .evaluate import perplexity_and_kl
from .generate import continue_prompt
from .text import Splits, batches, sample_windows


@dataclass(frozen=True)
class Arm:
    """A way to 2 bits. quant None: unquantized. rates None: no training. `rates`: learning rates of TrainConfig."""

    name: str
    what: str
    quant: Method | None
    rates: dict[str, float] | None = None
    teacher: bool = True


_SCALAR = LCQAT(codebook="scalar", rotate="none")

ARMS = (
    Arm("fp", "unquantized; the control trains on, on next tokens", None, {"lr_rest": 5e-4}, teacher=False),
    Arm("rtn", "scalar, rounded plainly", replace(_SCALAR, feedback=False)),
    Arm("gptq", "scalar, rounded with error feedback", _SCALAR),
    Arm(
        "sq-paretoq",
        "scalar QAT from its published start: step = row maximum / 2",
        LSQ(feedback=False, scale="max"),
        {"lr_latents": 0.003, "lr_scales": 0.01, "lr_codebooks": 0.01},
    ),
    Arm(
        "sq",
        "scalar QAT from the start with error feedback",
        LSQ(),
        {"lr_latents": 0.003, "lr_scales": 0.001, "lr_codebooks": 0.001},
    ),
    Arm(
        "lcqat-release",
        "scalar grid, rotated, frozen codebook, DGE gradient",
        LCQAT(codebook="scalar", learn_codebook=False, estimator="dge", start_on_codes=True),
        {"lr_latents": 0.003, "lr_scales": 0.003, "lr_codebooks": 0.003},
    ),
    Arm(
        "lcqat-paper",
        "4-D integer lattice, rotated, A and b learned",
        LCQAT(codebook="lattice"),
        {"lr_latents": 0.001, "lr_scales": 0.003, "lr_codebooks": 0.003},
    ),
    Arm(
        "lcqat-planes",
        "untied bit-planes, rotated, A and b learned",
        LCQAT(),
        {"lr_latents": 0.001, "lr_scales": 0.003, "lr_codebooks": 0.003},
    ),
    Arm(
        "free-vq",
        "256-entry table, rotated, codes frozen, table learned",
        FreeVQ(),
        {"lr_scales": 0.002, "lr_codebooks": 0.002},
    ),
)


@dataclass(frozen=True)
class Budget:
    """What every arm gets. Tokens; `window` tokens per sequence, `batch` sequences per step."""

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
class Lab:
    """What all arms share: the unquantized model, the text and the budget."""

    teacher: nn.Module
    tokenizer: object
    text: Splits
    budget: Budget
    device: torch.device

    def calibration(self, seed: int) -> list[Tensor]:
        """Calibration batches [8, window] of a seed."""
        b = self.budget
        count = max(1, b.calibration_tokens // b.window)
        return list(sample_windows(self.text.train, count, b.window, torch.Generator().manual_seed(seed)).split(8))

    def batches(self, seed: int):
        """Training batches [batch, window] in the order of a seed."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return batches(self.text.train, self.budget.window, self.budget.batch, generator)

    def score(self, model: nn.Module, ids: Tensor | None = None) -> tuple[float, float]:
        """Perplexity and KL to the unquantized model on the test text (or other ids)."""
        ids = (self.text.test if ids is None else ids)[: self.budget.eval_tokens]
        found, kl = perplexity_and_kl(self.teacher, model, ids, self.budget.window)
        return found.value, kl


def start(lab: Lab, arm: Arm, seed: int) -> nn.Module:
    """A copy of the unquantized model, quantized as the arm says and not yet trained, in the precision of its file."""
    model = copy.deepcopy(lab.teacher)
    if arm.quant is not None:
        quantize(model, lab.calibration(seed), arm.quant, seed=seed)
        to_storage_precision(model)
    return model


def run_arm(
    lab: Lab,
    arm: Arm,
    seed: int,
    ppl_fp: float,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[dict, nn.Module, list[dict]]:
    """Quantize, score, train, score: the row of the results, the model and the training history.

    What is scored has the 16-bit scales and codebooks whose bits are counted: the model that its file will hold.
    """
    clock = time.perf_counter()
    model = start(lab, arm, seed)
    row = {"arm": arm.name, "seed": seed, "bits_per_weight": bits_per_weight(model).per_weight, "ppl_fp": ppl_fp}
    row["seconds_ptq"] = time.perf_counter() - clock
    row["ppl_ptq"], row["kl_ptq"] = lab.score(model)
    history: list[dict] = []
    row |= {"ppl_qat": None, "kl_qat": None, "code_flips": None, "tokens": 0, "seconds_qat": 0.0}
    if arm.rates is not None:
        clock = time.perf_counter()
        config = TrainConfig(steps=lab.budget.steps, **arm.rates)
        history = train(
            model,
            lab.batches(seed),
            config,
            lab.teacher if arm.teacher else None,
            checkpoint=checkpoint,
            on_step=on_step,
        )
        row["seconds_qat"] = time.perf_counter() - clock
        to_storage_precision(model)
        row["ppl_qat"], row["kl_qat"] = lab.score(model)
        row["code_flips"], row["tokens"] = history[-1]["flips"], history[-1]["tokens"]
    return row | {"peak_mb": peak_mb(lab.device)}, model, history


def continue_text(lab: Lab, model: nn.Module, prompt: str, tokens: int = 40) -> str:
    """Greedy continuation of a prompt."""
    _, new = continue_prompt(model, lab.tokenizer, prompt, tokens)
    return lab.tokenizer.decode(new, skip_special_tokens=True)


def fitting(budget: Budget, model: nn.Module, text: Splits) -> Budget:
    """The budget as far as model and text go: windows that the model reads, no more text than there is.

    ValueError for a text without one training batch.
    """
    window = min(budget.window, longest_window(model) or budget.window)
    if len(text.train) < window * budget.batch:
        raise ValueError(
            f"the text {text.source!r} has {len(text.train)} training tokens, and one step takes "
            f"{window * budget.batch}: give a longer text"
        )
    calibration, judged = min(budget.calibration_tokens, len(text.train)), min(budget.eval_tokens, len(text.test))
    return replace(budget, window=window, calibration_tokens=calibration, eval_tokens=judged)


def settings(arms: list[Arm], budget: Budget, model: str, text: str, prompt: str, digest: str | None = None) -> dict:
    """All that decides a result, as plain JSON values. digest: of the text's token ids, Splits.digest."""
    found = {
        "model": model,
        "text": text,
        "text_digest": digest,
        "budget": asdict(budget),
        "prompt": prompt,
        "arms": {arm.name: asdict(arm) for arm in arms},
    }
    return json.loads(json.dumps(found))


def made_with(lab: Lab) -> dict:
    """What the files of results beside compare.json (rates, ablations) were made with: budget and text."""
    return {"budget": asdict(lab.budget), "text": lab.text.source, "text_digest": lab.text.digest}


def peak_mb(device: torch.device) -> float | None:
    """Peak memory of the process so far (CPU) or of the allocator (CUDA), MB; None where the system cannot tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
