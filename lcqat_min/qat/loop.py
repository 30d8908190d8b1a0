"""Quantization-aware training: a plain loop that distils the unquantized model into the quantized one.

The forward pass rounds latents to digits, decodes and multiplies. The backward pass goes through the rounding by its
surrogate gradient, so latents, scales, codebooks and all other parameters learn together. The loss is, by default,

    KL( p_teacher || p_student ) = sum_v p_t(v) (log p_t(v) - log p_s(v))      mean over tokens, nats

against the unquantized model, for which text is enough; without a teacher it is next-token cross-entropy. The optimizer
is AdamW with beta = (0.9, 0.95), and rates in the units of qat/config.py.

What trains is kept in fp32: in bf16, 1 + 0.001 is 1, so small steps would round to nothing. For speed use
torch.autocast (around the call of `train`) or an accelerator, which leave the parameters in fp32.

A run can be stopped and resumed (qat/checkpoint.py): batches that were used before are drawn again and skipped. Same
seed, same batches, same result, except with dropout, whose masks are drawn anew.

Limits: no gradient accumulation, and no sharding of its own. Pass an `accelerate.Accelerator` for several devices or
mixed precision; each process brings its own share of the batches.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..language_model import Batch, check_model, keep_modes, logits_of, read_batch
from ..layer.linear import quant_layers
from .config import TrainConfig
from .history import compared, gradient_norms, start_of
from .loss import distillation_loss


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

    teacher: the unquantized model to distil from, set to evaluation mode; None trains on next tokens.
    checkpoint: a file to save to and, if it exists, to resume from. on_step(step, loss) is called after each step, for
    progress bars. accelerator: an accelerate.Accelerator, which prepares model and optimizer.

    The history has one row per log point: step, tokens, loss (nats per token, mean since the last row), rate, flips
    (share of the codebook indices that differ from the start), grad_<group> (norm of its gradients) and, with
    config.log_movement, moved_<group> (root mean square of its movement since the start).

    Raises FloatingPointError at the first loss or gradient that is not finite, naming the step and a parameter;
    TypeError for parameters that train in less than fp32; ImportError for a checkpoint without safetensors; ValueError
    for a teacher with another vocabulary or with parameters of the model, for bad batches or too few, for a checkpoint
    that is damaged or of another run, and where there is nothing to distil: the model is not quantized, or the teacher
    is.
    """
    accelerator, path = accelerator or _OneProcess(), checkpoint and Path(checkpoint).expanduser()
    _check(model, teacher, accelerator)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.95), weight_decay=0.0)
    loop_model, stepper = accelerator.prepare(model, optimizer)
    groups = optimizer.param_groups
    start = start_of(model, config.log_movement)  # after prepare, which may move the parameters to another device
    run: dict[str, Any] = {"step": 0, "tokens": 0, "losses": [], "history": []}
    if path:
        from .checkpoint import resume, save

        settings = asdict(config) | {"loss": "next token" if teacher is None else "KL"}
        accelerator.wait_for_everyone()
        start, run = resume(path, model, optimizer, start, settings, run)
    optimizer.zero_grad()  # an interrupted run may have left gradients
    with keep_modes(model):
        model.train()
        for step, batch in zip(range(run["step"], config.steps), islice(batches, run["step"], None), strict=False):
            for group in groups:
                group["lr"] = group["full_lr"] * config.rate(step)
            ids, mask = read_batch(batch, model, "training")
            loss = _loss(loop_model, ids, mask, teacher)
            norms = _gradients(loss, groups, config.clip, step, accelerator)
            stepper.step()
            stepper.zero_grad()
            run["step"] = done = step + 1
            run["tokens"] += (ids.numel() if mask is None else int(mask.sum())) * accelerator.num_processes
            run["losses"].append(loss.item())
            if done % config.log_every == 0 or done == config.steps:
                mean = sum(run["losses"]) / len(run["losses"])
                row = {"step": done, "tokens": run["tokens"], "loss": mean, "rate": config.rate(step), **norms}
                run["history"].append(row | compared(model, groups, start))
                run["losses"] = []
            if on_step:
                on_step(step, loss.item())
            if path and accelerator.is_main_process and (done % config.checkpoint_every == 0 or done == config.steps):
                save(path, model, optimizer, start, settings, run)
    if (done := run["step"]) < config.steps:
        raise UsageError(f"the batches ended after {done} of {config.steps} steps: give more (an iterator ends once)")
    return run["history"]


def _check(model: nn.Module, teacher: nn.Module | None, accelerator) -> None:
    check_model(model)
    if teacher is not None:
        check_model(teacher)
        if teacher is model or any(quant_layers(teacher)):
            raise UsageError("the teacher is the model itself, or quantized: copy.deepcopy(model) before quantizing it")
        if not any(quant_layers(model)):
            raise UsageError("the model has no layer to train: quantize it, or load_packed(folder, trainable=True)")
        theirs = set(teacher.parameters())
        if shared := [name for name, p in model.named_parameters() if p.requires_grad and p in theirs]:
            raise UsageError(f"the teacher shares {shared[0]!r} with the model: copy.deepcopy(model) before quantizing")
    if away := [name for name, p in model.named_parameters() if p.is_meta]:
        raise UsageError(f"{away[0]!r} is not in memory (meta device, or offloaded): load the model whole to train it")
    if (count := accelerator.gradient_accumulation_steps) != 1:
        raise UsageError(f"the accelerator accumulates {count} batches per step, train takes 1: give larger batches")


class _OneProcess:
    """What `train` needs of an accelerator, for one process and the model's own precision."""

    is_main_process, num_processes, scaler, gradient_accumulation_steps = True, 1, None, 1
    prepare = staticmethod(lambda *objects: objects)
    unscale_gradients = wait_for_everyone = staticmethod(lambda: None)

    def backward(self, loss: Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):  # else the backward pass of fp32 weights runs in bf16
            loss.backward()


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Groups for AdamW, one per tensor, as each has its own unit: params, name, group, lr and full_lr.

    Raises TypeError for a parameter that requires a gradient in bf16 or fp16, ValueError where none does.
    """
    units = {getattr(layer, name): unit for _, layer in quant_layers(model) for name, unit in layer.units().items()}
    groups = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            if p.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name!r} is {p.dtype}, which loses small steps: call model.float(), or freeze it")
            group, unit = units.get(p, ("rest", 1.0))
            rate = getattr(config, f"lr_{group}") * unit
            groups.append({"params": [p], "name": name, "group": group, "lr": rate, "full_lr": rate})
    if not groups:
        raise UsageError("no parameter requires a gradient: call model.requires_grad_(True), or on what should train")
    return groups


def _loss(model: nn.Module, ids: Tensor, mask: Tensor | None, teacher: nn.Module | None) -> Tensor:
    logits = logits_of(model, ids, mask)
    ids, mask = ids.to(logits.device), None if mask is None else mask.to(logits.device)
    if teacher is None:
        pairs = slice(None) if mask is None else mask[:, 1:] & mask[:, :-1]
        return nn.functional.cross_entropy(logits[:, :-1][pairs].flatten(0, -2).float(), ids[:, 1:][pairs].flatten())
    with torch.no_grad():
        target = logits_of(teacher.eval(), ids, mask).to(logits.device)
    return distillation_loss(logits, target) if mask is None else distillation_loss(logits[mask], target[mask])


def _gradients(loss: Tensor, groups: list[dict], limit: float, step: int, accelerator) -> dict[str, float]:
    """The backward pass, and gradients scaled to a joint norm of at most `limit`; the norms of groups before that."""
    accelerator.backward(loss)
    accelerator.unscale_gradients()
    norms = gradient_norms(groups)
    norm = math.hypot(*norms.values())
    if not math.isfinite(loss.item() if accelerator.scaler else loss.item() + norm):  # a scaler skips what overflows
        raise FloatingPointError(f"the loss is {loss.item()}, the gradient {norm} at step {step}; {_culprit(groups)}")
    nn.utils.clip_grads_with_norm_([p for group in groups for p in group["params"]], limit, torch.tensor(norm))
    return norms


def _culprit(groups: list[dict]) -> str:
    """The first parameter or, since the backward pass goes the other way, the last gradient that is not finite."""
    tensors = [(f"{group['name']!r}", group["params"][0]) for group in groups]
    tensors += [(f"the gradient of {name}", p.grad) for name, p in reversed(tensors) if p.grad is not None]
    wrong = (f"{name} holds NaN or infinity: look there" for name, x in tensors if not torch.isfinite(x).all())
    return next(wrong, "all that trains is finite: check the batch, the teacher and the dtype (fp16 overflows)")
