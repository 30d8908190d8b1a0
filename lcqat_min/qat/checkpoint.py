"""What a training run remembers: its history, and all that it needs to go on after it was stopped.

    history      a row a log point: loss, flips, and for each kind of parameter its gradient and its movement
    checkpoint   one safetensors file, written whole or not at all: parameters now and at the start, what the
                 quantized layers hold besides, the optimizer's state, and as JSON the settings, the steps done
                 and the history

A file is refused before anything is touched when it is damaged, was made with other settings, or started from
another model. The same quantization with another number of threads or on another device differs in last digits:
such a start counts as the same (ALIKE), and the file's is taken. Limits: neither the teacher nor the text is in
the file; bring the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..disk.tensor_file import reading, save_tensors
from ..errors import UsageError
from ..ptq.model import quant_layers

if TYPE_CHECKING:
    from .loop import TrainConfig

GROUPS = ("latents", "scales", "codebooks", "rest")
ALIKE = 0.99  # of the numbers of a tensor agree to a thousandth: another seed changes nearly all


def check_writable() -> None:
    """ImportError, before the first step rather than after many, where checkpoints cannot be written."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a checkpoint needs safetensors, which this Python lacks: `pip install safetensors`, or "
            "train without a checkpoint"
        ) from error


class Run:
    """What is needed to describe, save and resume a run."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.AdamW, config: TrainConfig, loss: str):
        self.model, self.optimizer = model, optimizer
        self.config, self.settings = config, json.dumps(asdict(config) | {"loss": loss})
        self.groups = list(optimizer.param_groups)
        self.start = {g["name"]: g["params"][0].detach().clone() for g in self.groups}
        self.fixed = {
            f"{name}.{key}": tensor.detach()
            for name, layer in quant_layers(model)
            for key, tensor in (*layer.named_buffers(), *layer.named_parameters())
            if not tensor.requires_grad
        }  # signs, frozen codebooks
        self.start_codes = self._codes()

    def _codes(self) -> dict[str, Tensor]:
        return {name: layer.codes().to(torch.int32) for name, layer in quant_layers(self.model)}

    def is_log_point(self, step: int) -> bool:
        """Whether a row of the history is due after `step`, counted from 0."""
        return (step + 1) % self.config.log_every == 0 or step + 1 == self.config.steps

    def _by_kind(self, value: Callable[[dict], tuple[float, int]], mean: bool) -> Iterator[tuple[str, float]]:
        for kind in GROUPS:
            parts = [value(g) for g in self.groups if g["kind"] == kind]
            if parts:
                total = sum(square for square, _ in parts) / (sum(count for _, count in parts) if mean else 1)
                yield kind, total**0.5

    def gradient_norms(self) -> dict[str, float]:
        """grad_<kind>: joint norm of the gradients of each kind of parameter, before clipping."""

        def square(group: dict) -> tuple[float, int]:
            grad = group["params"][0].grad
            return (0.0, 1) if grad is None else (grad.float().square().sum().item(), grad.numel())

        return {f"grad_{kind}": norm for kind, norm in self._by_kind(square, mean=False)}

    def row(self, step: int, tokens: int, losses: list[float], grads: dict[str, float]) -> dict:
        """A row of the history after `step` (from 0), as train.train describes it: losses in nats a token since the
        last row, flips as a share of all codes, moved_<kind> as a root mean square since the start."""

        def square(group: dict) -> tuple[float, int]:
            moved = group["params"][0].detach() - self.start[group["name"]]
            return moved.float().square().sum().item(), moved.numel()

        codes = self._codes()
        count = sum(c.numel() for c in codes.values())
        flips = sum((codes[name] != start).sum().item() for name, start in self.start_codes.items())
        return {
            "step": step + 1,
            "tokens": tokens,
            "loss": sum(losses) / len(losses),
            "rate": self.config.rate(step),
            "flips": flips / max(count, 1),
            **grads,
            **{f"moved_{kind}": rms for kind, rms in self._by_kind(square, mean=True)},
        }

    def save(self, path: Path, step: int, tokens: int, history: list[dict], losses: list[float]) -> None:
        """Write all that `load` gives back: steps done, tokens seen, losses since the last row of the history."""
        tensors = {f"fixed.{name}": buffer for name, buffer in self.fixed.items()}
        for group in self.groups:
            parameter, name = group["params"][0], group["name"]
            state = self.optimizer.state[parameter]
            tensors |= {
                f"now.{name}": parameter.detach(),
                f"start.{name}": self.start[name],
                **{f"adam.{key}.{name}": value for key, value in state.items()},
            }
        meta = {"step": step, "tokens": tokens, "history": history, "losses": losses}
        save_tensors(tensors, path, {"settings": self.settings, **{key: json.dumps(meta[key]) for key in meta}})

    def load(self, path: Path) -> tuple[int, int, list[dict], list[float]]:
        """Restore parameters and optimizer; returns steps done, tokens seen, history, losses since its last row.

        Nothing is touched before the whole file has been read and found to belong to this run.
        """
        from safetensors import safe_open

        with reading(path, "it is no whole checkpoint, delete it to start afresh"):
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        self._check(path, meta, tensors)
        with torch.no_grad():
            for name, buffer in self.fixed.items():
                buffer.copy_(tensors[f"fixed.{name}"])
            for group in self.groups:
                group["params"][0].copy_(tensors[f"start.{group['name']}"])
                self.start[group["name"]].copy_(tensors[f"start.{group['name']}"])
            self.start_codes = self._codes()
            for group in self.groups:
                parameter, name = group["params"][0], group["name"]
                parameter.copy_(tensors[f"now.{name}"])
                state = {
                    key: tensors[f"adam.{key}.{name}"]
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"adam.{key}.{name}" in tensors
                }
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
                }
        return tuple(json.loads(meta[key]) for key in ("step", "tokens", "history", "losses"))

    def _check(self, path: Path, meta: dict[str, str], tensors: dict[str, Tensor]) -> None:
        saved = {name[4:]: tensor.shape for name, tensor in tensors.items() if name.startswith("now.")}
        ours = {group["name"]: group["params"][0].shape for group in self.groups}
        if meta.get("settings") != self.settings or "tokens" not in meta or saved != ours:
            raise UsageError(
                f"{path} is the checkpoint of another run (other config, loss or model): delete it to "
                "start afresh, or run with the settings it was made with"
            )
        begun = {f"start.{name}": start for name, start in self.start.items()}
        begun |= {f"fixed.{name}": buffer for name, buffer in self.fixed.items()}
        for name, ours in begun.items():
            if name not in tensors or not _alike(tensors[name], ours.cpu()):
                raise UsageError(
                    f"{path} started from another model ({name.partition('.')[2]!r} differs): quantize "
                    "again as for that run, or delete the file to start afresh"
                )


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.float()
    near = torch.isclose(one, other, rtol=1e-3, atol=1e-3 * other.square().mean().sqrt().item())
    return near.float().mean().item() >= ALIKE


def agree(done: int) -> None:
    """All processes resume at the same step, or none does."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, done)
    if len(set(found)) > 1:
        raise UsageError(
            f"the processes resume after {found} steps: keep the checkpoint where all of them can "
            "read it, or delete it to start afresh"
        )
