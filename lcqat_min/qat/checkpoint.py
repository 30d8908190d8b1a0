"""A training run in one file: to stop it, and to resume it with the result of an uninterrupted run.

The safetensors file is written whole or not at all. It holds

    trained.<name>      all parameters that train, as they are now
    fixed.<name>        what the quantized layers hold besides: signs, frozen codebooks, frozen indices
    adam.<key>.<name>   the state of the optimizer: step, exp_avg, exp_avg_sq
    start.<name>        the start that flips and movement count from (qat/history.py)

and as JSON the settings of the run, the full rate of each parameter, whose unit was measured at the start, and the
progress: steps done, tokens seen, history, losses since its last row.

The file is the truth: it overwrites any model of the same names and shapes, however that one was made. It is refused,
before anything is changed, where it is damaged or has other settings, names or shapes.

Limits: the teacher, the text and unquantized parameters that are frozen are not in the file. Bring the same ones.
"""

import json
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from ..disk.tensor_file import reading, save_tensors
from ..errors import UsageError
from ..layer.linear import quant_layers

Tensors = dict[str, Tensor]


def save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, start: Tensors, settings: dict, progress: dict
) -> None:
    """Write all that `resume` restores, in place of any file of that name. settings, progress: what JSON can hold."""
    tensors = _kept(model) | _named("start", start)
    for group in optimizer.param_groups:
        for key, value in optimizer.state[group["params"][0]].items():
            tensors[f"adam.{key}.{group['name']}"] = value
    rates = {group["name"]: group["full_lr"] for group in optimizer.param_groups}
    meta = {"settings": settings, "rates": rates, "progress": progress}
    save_tensors(tensors, path, {key: json.dumps(value) for key, value in meta.items()})


def resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, start: Tensors, settings: dict, progress: dict
) -> tuple[Tensors, dict]:
    """Restore the model and an optimizer that has no state yet, if there is a file; the start and progress of the run.

    ValueError where the file is damaged or belongs to another run; then nothing has been changed. ImportError where
    checkpoints cannot be written: before the first step, not after many.
    """
    if find_spec("safetensors") is None:
        raise ImportError("a checkpoint needs safetensors: `pip install safetensors`, or train without a checkpoint")
    if not path.exists():
        return start, progress
    from safetensors import safe_open

    with reading(path, "delete it to start again"), safe_open(path, framework="pt") as file:
        meta, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    kept, adam = _kept(model), [name for name in tensors if name.startswith("adam.")]
    shapes = {name: tensor.shape for name, tensor in (kept | _named("start", start)).items()}
    same = {name: tensor.shape for name, tensor in tensors.items() if name not in adam} == shapes
    if not same or meta.get("settings") != json.dumps(settings):
        run = "the checkpoint of another run (other settings, loss or model)"
        raise UsageError(f"{path} is {run}: delete it to start again, or run with the settings that it was made with")
    with torch.no_grad():
        for name, tensor in kept.items():
            tensor.copy_(tensors[name])
    parameters, rates = {}, json.loads(meta["rates"])
    for group in optimizer.param_groups:
        parameters[group["name"]], group["full_lr"] = group["params"][0], rates[group["name"]]
    for name in adam:
        _, key, parameter = name.split(".", 2)
        p, value = parameters[parameter], tensors[name]
        optimizer.state[p][key] = value.to(p.device) if value.ndim else value  # AdamW counts steps on the CPU
    return {name: tensors[f"start.{name}"] for name in start}, json.loads(meta["progress"])


def _kept(model: nn.Module) -> Tensors:
    """The tensors of the model that a file holds, by their names there."""
    layers = tuple(f"{name}." for name, _ in quant_layers(model))
    named = list(chain(model.named_parameters(), model.named_buffers()))
    trained = {name: tensor for name, tensor in named if tensor.requires_grad}
    fixed = {name: tensor for name, tensor in named if name.startswith(layers) and name not in trained}
    return _named("trained", trained) | _named("fixed", fixed)


def _named(kind: str, tensors: Tensors) -> Tensors:
    return {f"{kind}.{name}": tensor for name, tensor in tensors.items()}
