"""Quantization-aware training: a plain loop that distils the unquantized model into the quantized one.

The forward pass rounds latents to codes, decodes and multiplies; the backward pass goes through the rounding by its
surrogate gradient. So latents, scales, codebooks and all other parameters learn together. The loss is, by default,

    KL( p_teacher || p_student ) = sum_v p_t(v) (log p_t(v) - log p_s(v))      mean over tokens, nats

against the unquantized model (whose text is then all that is needed), else next-token cross-entropy.

Learning rates have units, because AdamW moves every number by about its rate each step, whatever its gradient:

    latents    bins a step: 0.03 crosses half a bin in about 17 steps       times the layer's bin width
    scales     share of their root mean square a step                        times that root mean square
    codebooks  the same
    rest       plain (embeddings, norms, biases)

So one number means the same for a grid, for bit-planes and for weights with a learned step, and arms can be compared.
Schedule: linear warm-up, constant, linear decay to zero; the three parts sum to the number of steps. No weight decay:
on a latent it pulls towards a rounding boundary.

A run can be stopped and resumed: one safetensors file, written whole or not at all, holds parameters, optimizer state
and history; batches that were already used are drawn again and passed over. Same seed, same batches, same result.

Gives up: no gradient accumulation, no sharding of its own. Pass an `accelerate.Accelerator` for several devices or
mixed precision.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from .convert import quant_layers
from .linear import AffineLinear, StepLinear

KL_ELEMENTS = 1 << 25  # logits compared at a time: 128 MiB of fp32
GROUPS = ("latents", "scales", "codebooks", "rest")


@dataclass(frozen=True)
class TrainConfig:
    """steps: optimizer steps. Rates: see the units above. warmup, decay: shares of the steps. clip: gradient norm.
    log_every: steps between rows of the history. checkpoint_every: steps between checkpoints, where a path is given."""

    steps: int
    lr_latents: float = 0.03
    lr_scales: float = 1e-3
    lr_codebooks: float = 1e-3
    lr_rest: float = 5e-4
    warmup: float = 0.05
    decay: float = 0.5
    clip: float = 1.0
    log_every: int = 16
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1 or self.log_every < 1 or self.checkpoint_every < 1:
            raise ValueError(f"TrainConfig: steps {self.steps}, log_every {self.log_every} and checkpoint_every "
                             f"{self.checkpoint_every} must be at least 1")
        if self.warmup < 0 or self.decay < 0 or self.warmup + self.decay > 1:
            raise ValueError(f"TrainConfig: warmup {self.warmup} and decay {self.decay} are shares; their sum is at most 1")

    def phases(self) -> tuple[int, int, int]:
        """Steps of warm-up, constant rate and decay; they sum to `steps`."""
        warmup, decay = round(self.warmup * self.steps), round(self.decay * self.steps)
        return warmup, self.steps - warmup - decay, decay

    def rate(self, step: int) -> float:
        """Share of the full learning rates at `step`, counted from 0."""
        warmup, stable, decay = self.phases()
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 1.0 if step < warmup + stable else (self.steps - step) / (decay + 1)


def train(model: nn.Module, batches: Iterable[Tensor], config: TrainConfig, teacher: nn.Module | None = None, *,
          checkpoint: Path | None = None, on_step: Callable[[int, float], None] | None = None,
          accelerator=None) -> list[dict]:
    """Train `model` in place for config.steps batches of token ids [B, T]; returns the history, a row a log point.

    teacher: the unquantized model, distilled from; None trains on next tokens. checkpoint: a file to save to and, if it
    is there, to resume from. on_step(step, loss) is called after each step (progress bars). accelerator: an
    accelerate.Accelerator that prepares the model and runs backward.
    A row: step, tokens, loss (nats a token, mean since the last row), rate, flips (share of codes that differ from the
    start), and for each parameter group grad_* (norm of its gradient) and moved_* (root mean square of its movement).
    Raises FloatingPointError at the first loss that is not finite, naming the step and a layer; ValueError for a
    teacher with another vocabulary, for too few batches and for a checkpoint of another run.
    """
    groups = parameter_groups(model, config)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    run = _Run(model, optimizer, config)
    done, history = run.load(checkpoint) if checkpoint and checkpoint.exists() else (0, [])
    loop_model, backward = model, torch.Tensor.backward
    if accelerator is not None:
        loop_model, optimizer = accelerator.prepare(model, optimizer)
        backward = accelerator.backward
    device = next(loop_model.parameters()).device
    was_training = model.training
    model.train()
    step, losses = done, []
    try:
        for step, batch in enumerate(islice(batches, done, config.steps), start=done):
            batch = batch.to(device)
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * config.rate(step)
            loss = _loss(loop_model, batch, teacher)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss is {loss.item()} at step {step}; {_culprit(model)}")
            backward(loss)
            grads = run.gradient_norms() if run.is_log_point(step) else None
            torch.nn.utils.clip_grad_norm_(loop_model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if grads is not None:
                history.append(run.row(step, batch.numel(), losses, grads))
                losses = []
            if on_step:
                on_step(step, loss.item())
            if checkpoint and (step + 1) % config.checkpoint_every == 0:
                run.save(checkpoint, step + 1, history)
    finally:
        model.train(was_training)
    if step + 1 < config.steps:
        raise ValueError(f"the batches ended after {step + 1} of {config.steps} steps; give more text or fewer steps")
    return history


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """AdamW groups, one a tensor (a tensor's rate follows its own unit): params, name, kind, lr, full_lr."""
    kinds: dict[int, tuple[str, float]] = {}
    for _, layer in quant_layers(model):
        if isinstance(layer, (AffineLinear, StepLinear)):
            kinds[id(layer.latent)] = "latents", config.lr_latents * bin_width(layer)
        for kind, rate, names in (("scales", config.lr_scales, ("row_scale", "col_scale")),
                                  ("codebooks", config.lr_codebooks, ("A", "b", "table"))):
            for name in names:
                if isinstance(value := getattr(layer, name, None), nn.Parameter):
                    size = getattr(layer, "A", value) if name == "b" else value  # b starts near zero: measure it by A
                    kinds[id(value)] = kind, rate * size.detach().square().mean().sqrt().item()
    groups = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind, rate = kinds.get(id(parameter), ("rest", config.lr_rest))
            groups.append({"params": [parameter], "name": name, "kind": kind, "lr": rate, "full_lr": rate})
    return groups


def bin_width(layer: nn.Module) -> float:
    """Width of a rounding bin in units of the layer's latents: 1 on a grid, 2 from -1 to +1, else the step size."""
    if isinstance(layer, StepLinear):
        return layer.row_scale.detach().mean().item()
    return 2.0 if layer.levels == 2 else 1.0


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher || student) over tokens, nats: logits [..., V] -> scalar with gradient to `student`."""
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"student and teacher differ in vocabulary: {student.shape[-1]} and {teacher.shape[-1]} logits. "
                         "Distil from the same model before quantization.")
    return _TeacherKL.apply(student.flatten(0, -2), teacher.flatten(0, -2))


class _TeacherKL(torch.autograd.Function):
    """Loss and gradient in one pass over slices of tokens: d loss / d logits = (p_s - p_t) / tokens."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        grad = torch.empty_like(student)
        total = student.new_zeros((), dtype=torch.float64)
        rows = max(1, KL_ELEMENTS // student.shape[1])
        for s, t, g in zip(student.split(rows), teacher.split(rows), grad.split(rows)):
            log_s, log_t = s.float().log_softmax(1), t.float().log_softmax(1)
            p_t = log_t.exp()
            total += ((log_t - log_s) * p_t).sum().double()
            g.copy_((log_s.exp() - p_t) / len(student))
        ctx.save_for_backward(grad)
        return (total / len(student)).float()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return ctx.saved_tensors[0] * upstream, None


def _loss(model: nn.Module, batch: Tensor, teacher: nn.Module | None) -> Tensor:
    logits = model(input_ids=batch, use_cache=False).logits
    if teacher is None:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
    with torch.no_grad():
        target = teacher(input_ids=batch, use_cache=False).logits
    return distillation_loss(logits, target)


def _culprit(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"{name!r} is the first parameter that holds NaN or infinity. Lower its learning rate."
    return "all parameters are finite. Check the batch, the teacher and the dtype (fp16 overflows; use bf16)."


class _Run:
    """What is needed to describe, save and resume a run."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.AdamW, config: TrainConfig):
        self.model, self.optimizer, self.config = model, optimizer, config
        self.groups = list(optimizer.param_groups)
        self.start = {g["name"]: g["params"][0].detach().clone() for g in self.groups}
        self.start_codes = self._codes()
        self.tokens = 0

    def _codes(self) -> dict[str, Tensor]:
        return {name: layer.codes().to(torch.int32) for name, layer in quant_layers(self.model)}

    def is_log_point(self, step: int) -> bool:
        return (step + 1) % self.config.log_every == 0 or step + 1 == self.config.steps

    def _by_kind(self, value: Callable[[dict], tuple[float, int]], mean: bool) -> Iterator[tuple[str, float]]:
        for kind in GROUPS:
            parts = [value(g) for g in self.groups if g["kind"] == kind]
            if parts:
                total = sum(square for square, _ in parts) / (sum(count for _, count in parts) if mean else 1)
                yield kind, total**0.5

    def gradient_norms(self) -> dict[str, float]:
        def square(group: dict) -> tuple[float, int]:
            grad = group["params"][0].grad
            return (0.0, 1) if grad is None else (grad.float().square().sum().item(), grad.numel())

        return {f"grad_{kind}": norm for kind, norm in self._by_kind(square, mean=False)}

    def row(self, step: int, tokens_a_step: int, losses: list[float], grads: dict[str, float]) -> dict:
        def square(group: dict) -> tuple[float, int]:
            moved = group["params"][0].detach() - self.start[group["name"]]
            return moved.float().square().sum().item(), moved.numel()

        codes = self._codes()
        count = sum(c.numel() for c in codes.values())
        flips = sum((codes[name] != start).sum().item() for name, start in self.start_codes.items())
        return {"step": step + 1, "tokens": (step + 1) * tokens_a_step, "loss": sum(losses) / len(losses),
                "rate": self.config.rate(step), "flips": flips / max(count, 1), **grads,
                **{f"moved_{kind}": rms for kind, rms in self._by_kind(square, mean=True)}}

    def save(self, path: Path, step: int, history: list[dict]) -> None:
        from safetensors.torch import save_file

        tensors = {}
        for group in self.groups:
            parameter, name = group["params"][0], group["name"]
            state = self.optimizer.state[parameter]
            tensors |= {f"now.{name}": parameter.detach(), f"start.{name}": self.start[name],
                        **{f"adam.{key}.{name}": value for key, value in state.items()}}
        meta = {"step": str(step), "config": json.dumps(asdict(self.config)), "history": json.dumps(history)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary, metadata=meta)
        os.replace(temporary, path)

    def load(self, path: Path) -> tuple[int, list[dict]]:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            meta, names = file.metadata() or {}, set(file.keys())
            ours = {f"now.{g['name']}" for g in self.groups}
            same = all(name in names and file.get_slice(name).get_shape() == list(g["params"][0].shape)
                       for name, g in zip((f"now.{g['name']}" for g in self.groups), self.groups))
            if meta.get("config") != json.dumps(asdict(self.config)) or not same or not ours <= names:
                raise ValueError(f"{path} is the checkpoint of another run (other config or model): delete it to start "
                                 "afresh, or run with the settings it was made with")
            with torch.no_grad():
                for group in self.groups:
                    parameter, name = group["params"][0], group["name"]
                    parameter.copy_(file.get_tensor(f"now.{name}"))
                    start = file.get_tensor(f"start.{name}").to(parameter.device)
                    if not torch.equal(start, self.start[name]):
                        raise ValueError(f"{path} started from another model: {name!r} differs. Delete it to start afresh.")
                    keys = [k for k in names if k.startswith("adam.") and k.split(".", 2)[2] == name]
                    self.optimizer.state[parameter] = {k.split(".", 2)[1]: file.get_tensor(k).to(
                        "cpu" if k.startswith("adam.step.") else parameter.device) for k in keys}
        return int(meta["step"]), json.loads(meta["history"])
