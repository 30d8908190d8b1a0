"""The history of a training run: what a row says of gradients, codes and parameters.

    grad_<group>     sqrt( sum g^2 ) over the gradients of a group, before clipping
    flips            share of the codebook indices that differ from those at the start
    moved_<group>    sqrt( mean (p - p_start)^2 ) over the parameters of a group, in plain numbers

The start is a dict of tensors: `index.<layer>` holds the indices of a layer, in one byte each if they fit, and
`value.<parameter>` is a copy of a parameter, made only where movement is logged.

Limits: flips compare the start and now, so an index that flips and flips back does not count.
"""

import torch
from torch import Tensor, nn

from ..layer.linear import quant_layers


def start_of(model: nn.Module, with_values: bool) -> dict[str, Tensor]:
    """What later rows are compared with: all codebook indices and, with_values, a copy of all that trains."""
    indices = {f"index.{name}": layer.indices() for name, layer in quant_layers(model)}
    start = {name: index.to(torch.uint8 if index.max() < 256 else torch.int32) for name, index in indices.items()}
    values = ((name, p) for name, p in model.named_parameters() if with_values and p.requires_grad)
    return start | {f"value.{name}": p.detach().clone() for name, p in values}


def gradient_norms(groups: list[dict]) -> dict[str, float]:
    """grad_<group> for the groups of an optimizer that was made from `parameter_groups`."""
    grads: dict[str, list[Tensor]] = {}
    for group in groups:
        grads.setdefault(f"grad_{group['group']}", []).extend(p.grad for p in group["params"] if p.grad is not None)
    return {name: nn.utils.get_total_norm(found).item() for name, found in grads.items()}


def compared(model: nn.Module, groups: list[dict], start: dict[str, Tensor]) -> dict[str, float]:
    """flips and, for a start with values, moved_<group>: how the model differs from its start."""
    pairs = [(layer.indices(), start[f"index.{name}"]) for name, layer in quant_layers(model)]
    flipped = sum((now != before.to(now.device)).sum().item() for now, before in pairs)
    squares: dict[str, list[tuple[float, int]]] = {}
    for group in groups:
        if (before := start.get(f"value.{group['name']}")) is not None:
            moved = group["params"][0].detach() - before.to(group["params"][0].device)
            squares.setdefault(f"moved_{group['group']}", []).append((moved.square().sum().item(), moved.numel()))
    means = {name: sum(total for total, _ in found) / sum(n for _, n in found) for name, found in squares.items()}
    flips = flipped / max(1, sum(now.numel() for now, _ in pairs))
    return {"flips": flips} | {name: mean**0.5 for name, mean in means.items()}
