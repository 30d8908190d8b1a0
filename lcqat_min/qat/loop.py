"""Quantization-aware training: a plain loop that distils the unquantized model into the quantized one.

The forward pass rounds latents to codes, decodes and multiplies; the backward pass goes through the rounding
by its surrogate gradient. So latents, scales, codebooks and all other parameters learn together. The loss is,
by default,

    KL( p_teacher || p_student ) = sum_v p_t(v) (log p_t(v) - log p_s(v))      mean over tokens, nats

against the unquantized model (whose text is then all that is needed), else next-token cross-entropy.

Learning rates have units, because AdamW moves every number by about its rate each step, whatever its
gradient:

    latents    bins a step: 0.001 crosses half a bin in 500 steps            times the layer's (mean) bin width
    scales     share of their root mean square a step                        times that root mean square
    codebooks  the same
    rest       plain (embeddings, norms, biases)

So one number means the same for a grid, for bit-planes and for weights with a learned step, and methods can be
compared. Schedule: linear warm-up, constant, linear decay to zero; the three parts sum to the number of
steps. No weight decay: on a latent it pulls towards a rounding boundary.

What trains is kept in fp32: in bf16, 1 + 0.001 is 1, so small steps would round to nothing. For speed use
torch.autocast (around the call of `train`) or an accelerator, which leave the parameters in fp32.

A run can be stopped and resumed (qat/checkpoint.py); batches that were already used are drawn again and passed
over. Same seed, same batches, same result, but for dropout, whose masks are drawn afresh.

Gives up: no gradient accumulation, no sharding of its own. Pass an `accelerate.Accelerator` for several
devices or mixed precision; each process brings its own share of the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..language_model import IGNORED, Batch, check_model, keep_modes, logits_of, read_batch
from ..layer.linear import AffineLinear, StepLinear
from ..ptq.matrix import in_units
from ..ptq.model import quant_layers
from .checkpoint import Run, agree, check_writable
from .loss import distillation_loss


@dataclass(frozen=True)
class TrainConfig:
    """steps: optimizer steps. Rates: see the units above. warmup, decay: shares of the steps. clip: largest
    gradient norm. log_every, checkpoint_every: steps between rows of the history and between checkpoints."""

    steps: int
    lr_latents: float = 1e-3
    lr_scales: float = 3e-3
    lr_codebooks: float = 3e-3
    lr_rest: float = 5e-4
    warmup: float = 0.05
    decay: float = 0.5
    clip: float = 1.0
    log_every: int = 16
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1 or self.log_every < 1 or self.checkpoint_every < 1:
            raise UsageError(
                f"TrainConfig: steps {self.steps}, log_every {self.log_every} and "
                f"checkpoint_every {self.checkpoint_every} must be at least 1"
            )
        if self.warmup < 0 or self.decay < 0 or self.warmup + self.decay > 1:
            raise UsageError(
                f"TrainConfig: warmup {self.warmup} and decay {self.decay} are shares of the "
                "steps: 0 or more each, and together at most 1"
            )
        rates = (self.lr_latents, self.lr_scales, self.lr_codebooks, self.lr_rest)
        if not all(rate >= 0 for rate in rates):
            raise UsageError(f"TrainConfig: learning rates {rates} must be 0 (frozen) or more")
        if self.clip <= 0:
            raise UsageError(f"TrainConfig.clip is {self.clip}; it must be above 0 (inf: do not clip)")

    def phases(self) -> tuple[int, int, int]:
        """Steps of warm-up, constant rate and decay; they sum to `steps`."""
        warmup = round(self.warmup * self.steps)
        decay = min(round(self.decay * self.steps), self.steps - warmup)  # both may have been rounded up
        return warmup, self.steps - warmup - decay, decay

    def rate(self, step: int) -> float:
        """Share of the full learning rates at `step`, counted from 0."""
        warmup, stable, decay = self.phases()
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 1.0 if step < warmup + stable else (self.steps - step) / (decay + 1)


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    teacher: nn.Module | None = None,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
    accelerator=None,
) -> list[dict]:
    """Train `model` in place for config.steps batches of token ids [B, T] (language_model.py); returns the history.

    teacher: the unquantized model, distilled from and set to evaluation mode; None trains on next tokens.
    checkpoint: a file to save to and, if it is there, to resume from. on_step(step, loss) is called after
    each step (progress bars). accelerator: an accelerate.Accelerator that prepares model and optimizer.

    The history has a row a log point: step, tokens, loss (nats a token, mean since the last row), rate, flips
    (share of codes that differ from the start), and for each parameter group grad_* (norm of its gradient)
    and moved_* (root mean square of its movement).

    Raises FloatingPointError at the first loss or gradient that is not finite, naming the step and a layer;
    TypeError for parameters that train in less than fp32; ValueError for a teacher with another vocabulary or with
    parameters of the model, for too few batches or bad ones, for a checkpoint that is damaged or of another run, and
    where there is nothing to distil: a model that is not quantized, a teacher that is.
    """
    accelerator = _OneProcess() if accelerator is None else accelerator
    _check(model, teacher, accelerator)
    if checkpoint:
        check_writable()
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.95), weight_decay=0.0)
    loop_model, stepper = accelerator.prepare(model, optimizer)
    # After prepare, which may move the parameters to another device.
    run = Run(model, optimizer, config, "next token" if teacher is None else "KL")
    checkpoint = None if checkpoint is None else Path(checkpoint).expanduser()
    done, tokens, history, losses = run.load(checkpoint) if checkpoint and checkpoint.exists() else (0, 0, [], [])
    agree(done)
    optimizer.zero_grad()  # an interrupted run may have left gradients
    with keep_modes(model):
        model.train()
        for step, batch in zip(range(done, config.steps), islice(batches, done, None), strict=False):
            for group in stepper.param_groups:
                group["lr"] = group["full_lr"] * config.rate(step)
            ids, mask = read_batch(batch, model, "training")
            loss = _loss(loop_model, ids, mask, teacher)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}; {_culprit(model)}")
            accelerator.backward(loss)
            accelerator.unscale_gradients()
            grads = run.gradient_norms() if run.is_log_point(step) else None
            _clip(model, config.clip, step, skips_overflow=accelerator.scaler is not None)
            stepper.step()
            stepper.zero_grad()
            losses.append(loss.item())
            tokens += (ids.numel() if mask is None else int(mask.sum())) * accelerator.num_processes
            if grads is not None:
                history.append(run.row(step, tokens, losses, grads))
                losses = []
            if on_step:
                on_step(step, loss.item())
            done = step + 1
            due = done % config.checkpoint_every == 0 or done == config.steps
            if checkpoint and due and accelerator.is_main_process:
                run.save(checkpoint, done, tokens, history, losses)
    if done < config.steps:
        raise UsageError(f"the batches ended after {done} of {config.steps} steps: give more (an iterator ends once)")
    return history


def _check(model: nn.Module, teacher: nn.Module | None, accelerator) -> None:
    for asked in (model,) if teacher is None else (model, teacher):
        check_model(asked)
    if teacher is model or teacher is not None and any(quant_layers(teacher)):
        raise UsageError("the teacher is the model itself, or quantized: copy.deepcopy(model) before quantize(model)")
    if teacher is not None and not any(quant_layers(model)):
        raise UsageError(
            "the model has no layer whose codes can be trained: quantize(model) first, or read a packed "
            "one with load_packed(folder, trainable=True)"
        )
    theirs = set() if teacher is None else set(map(id, teacher.parameters()))
    if shared := [name for name, p in model.named_parameters() if p.requires_grad and id(p) in theirs]:
        raise UsageError(f"the teacher shares {shared[0]!r} with the model: copy.deepcopy(model) before quantizing it")
    if away := [name for name, p in model.named_parameters() if p.is_meta]:
        raise UsageError(f"{away[0]!r} is not in memory (meta device, or offloaded): load the model whole to train it")
    if accelerator.gradient_accumulation_steps != 1:
        raise UsageError(
            f"the accelerator accumulates {accelerator.gradient_accumulation_steps} batches a step, train "
            "takes one: give larger batches, or more processes"
        )


class _OneProcess:
    """What `train` asks of an accelerator, for one process and the model's own precision."""

    is_main_process, num_processes, scaler, gradient_accumulation_steps = True, 1, None, 1

    def prepare(self, *objects: object) -> tuple:
        return objects

    def backward(self, loss: Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):  # else the fp32 weights' backward runs in bf16
            loss.backward()

    def unscale_gradients(self) -> None:
        pass


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """AdamW groups, one a tensor (a tensor's rate follows its own unit): params, name, kind, lr, full_lr.

    Raises TypeError for a parameter that requires a gradient in bf16 or fp16, ValueError where none does.
    """
    kinds: dict[int, tuple[str, float]] = {}
    for _, layer in quant_layers(model):
        if isinstance(layer, (AffineLinear, StepLinear)):
            kinds[id(layer.latent)] = "latents", config.lr_latents * bin_width(layer)
        for kind, rate, names in (
            ("scales", config.lr_scales, ("row_scale", "col_scale")),
            ("codebooks", config.lr_codebooks, ("A", "b", "table")),
        ):
            for name in names:
                if isinstance(value := getattr(layer, name, None), nn.Parameter):
                    size = layer.A if name == "b" else value  # b starts near zero: measure it by A
                    kinds[id(value)] = kind, rate * _root_mean_square(size.detach())
    groups = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{name!r} is {parameter.dtype}: small steps would round to nothing. Call "
                    "model.float() (for speed: torch.autocast), or requires_grad_(False) on it"
                )
            kind, rate = kinds.get(id(parameter), ("rest", config.lr_rest))
            groups.append({"params": [parameter], "name": name, "kind": kind, "lr": rate, "full_lr": rate})
    if not groups:
        raise UsageError(
            "no parameter requires a gradient: call model.requires_grad_(True), or requires_grad_ on the "
            "parameters to train"
        )
    return groups


def _root_mean_square(x: Tensor) -> float:
    x, unit = in_units(x)  # else squares of very large or small numbers are inf or 0
    return x.square().mean().sqrt().item() * unit


def bin_width(layer: nn.Module) -> float:
    """Width of a rounding bin in units of the layer's latents: 1 on a grid, 2 from -1 to +1, or the step."""
    if isinstance(layer, StepLinear):
        return layer.row_scale.detach().mean().item()
    return 2.0 if layer.levels == 2 else 1.0


def _loss(model: nn.Module, ids: Tensor, mask: Tensor | None, teacher: nn.Module | None) -> Tensor:
    logits = logits_of(model, ids, mask)
    ids, mask = (None if given is None else given.to(logits.device) for given in (ids, mask))
    if teacher is None:
        following = ids[:, 1:]
        if mask is not None:
            following = following.masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORED)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), following.flatten())
    with torch.no_grad():
        target = logits_of(teacher.eval(), ids, mask).to(logits.device)
    return distillation_loss(logits, target) if mask is None else distillation_loss(logits[mask], target[mask])


def _clip(model: nn.Module, limit: float, step: int, skips_overflow: bool) -> None:
    """Scale gradients to a joint norm of at most `limit`; skips_overflow: a loss scaler takes care of it."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if not torch.isfinite(norm) and not skips_overflow:
        raise FloatingPointError(f"the gradient's norm is {norm.item()} at step {step}; {_culprit(model)}")
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def _culprit(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"{name!r} is the first parameter that holds NaN or infinity. Lower its learning rate."
    for name, parameter in reversed(list(model.named_parameters())):  # backward went this way
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name!r} is the last that holds NaN or infinity: look there."
    return "all parameters are finite. Check the batch, the teacher and the dtype (fp16 overflows; use bf16)."
