"""Which layers of a model are quantized, and which stay as they are, and why.

A layer is quantized where the model uses its weight only by calling the layer: y = x W^T + bias, nn.Linear or
transformers' Conv1D with its transposed weight. These look like that and stay:

    the output head, and layers that the caller skips by name
    layers whose weight is used in two places, tied ones for example
    the small matrices of adapters (LoRA), which add to the layer that they adapt
    in models of text and images, all that is outside of the language model: no token of text goes there
    layers whose weight the model reads or writes itself: it would read packed codes once the layer is packed, and what
    it writes would be lost. `read_or_written` finds them while the model runs.

Limits: code that a short text without a cache does not reach, or that does not go through torch, is not noticed.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..language_model import keep_modes, run, text_config

SHARED = "their weight is used in two places"
HELPER = "they belong to an adapter; merge it first, or it stays beside the quantized layer"
OUTSIDE = "no text reaches them, as they are outside of the language model"
BYPASSED = "the model reads or writes their weight itself, instead of calling the layer"


def linear_layers(model: nn.Module, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that `quantize` replaces, unless `read_or_written` finds a reason against it."""
    return ((name, layer) for name, layer, why in _all_linear(model, skip) if not why)


def left_alone(model: nn.Module, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """Names of linear layers that are neither skipped nor quantized, and why."""
    return {name: why for name, _, why in _all_linear(model, skip) if why}


def _all_linear(model: nn.Module, skip: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, str]]:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside, helpers = _language_model(model), _helpers(model)
    for name, module in model.named_modules():
        is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        # Subclasses that compute something else (routers, adapters) stay. Falcon's is a linear map, written out.
        is_plain = type(module).__name__ == "FalconLinear" or type(module).forward is nn.Linear.forward
        is_linear = isinstance(module, nn.Linear) and is_plain
        skipped = module is head or any(part in name for part in skip)
        if (is_linear or is_conv1d) and not skipped and (count := uses[id(module.weight)]):
            reasons = {SHARED: count > 1, HELPER: module in helpers, OUTSIDE: module not in inside}
            yield name, module, next((reason for reason, holds in reasons.items() if holds), "")


def _language_model(model: nn.Module) -> set[nn.Module]:
    """The modules that text goes through: all, except where the config says that there are others."""
    whole = text_config(model) is getattr(model, "config", None) or not hasattr(model, "get_decoder")
    return set((model if whole else model.get_decoder()).modules())


def _helpers(model: nn.Module) -> set[nn.Module]:
    """What adapters put beside the layer that they adapt, which peft calls base_layer."""
    adapters = [module for module in model.modules() if isinstance(getattr(module, "base_layer", None), nn.Module)]
    children = [child for module in adapters for child in module.children() if child is not module.base_layer]
    return {helper for child in children for helper in child.modules()}


class _Watch(TorchDispatchMode):
    """Notes the layers whose weight goes into an operation while their forward does not run."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.owners = {layer.weight.data_ptr(): layer for layer in layers}
        self.running: set[nn.Module] = set()
        self.found: set[nn.Module | None] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler for this, which takes seconds

    def enter(self, layer: nn.Module, *_: object) -> None:
        self.running.add(layer)

    def leave(self, layer: nn.Module, *_: object) -> None:
        self.running.discard(layer)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if type(x) in (Tensor, nn.Parameter)]
        addresses = [x.data_ptr() for x in tensors if x.layout == torch.strided]  # others have none
        self.found |= {self.owners.get(address) for address in addresses} - self.running
        return func(*args, **(kwargs or {}))


def read_or_written(model: nn.Module, layers: Mapping[str, nn.Module], ids: Tensor) -> dict[str, str]:
    """Names of those `layers` whose weight the model uses without calling them, with BYPASSED for each.

    Runs token ids [B, T] through the model in training mode and in evaluation mode, since some models rescale weights
    when the mode changes. Raises what the model raises in evaluation mode.
    """
    watch = _Watch(layers.values())
    with keep_modes(model), ExitStack() as hooks, torch.no_grad(), torch.random.fork_rng(), watch:
        for layer in layers.values():
            hooks.enter_context(layer.register_forward_pre_hook(watch.enter))
            hooks.enter_context(layer.register_forward_hook(watch.leave, always_call=True))
        with suppress(Exception):  # a model that cannot be trained does not rescale
            run(model.train(), ids)
        run(model.eval(), ids)
    return {name: BYPASSED for name, layer in layers.items() if layer in watch.found}
