"""Which layers of a model are quantized, and which are left as they are, and why.

A layer is quantized where the model does nothing with its weight but to call the layer: y = x W^T + bias, nn.Linear or
transformers' Conv1D with its transposed weight. What looks like that and is not:

    the output head, and layers that the caller skips by name
    layers whose weight is used in two places, tied ones for example
    the small matrices of adapters (LoRA), which add to the layer that they adapt
    in models of text and images, all that is outside of the language model: no token of text goes there
    layers whose weight the model reads or writes itself: it would read codes once the layer is packed, and what it
    writes would be lost. `read_or_written` finds them while the model runs.

Limits: code that a short text without a cache does not reach, or that goes around torch, is not noticed.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..language_model import input_device, keep_modes, run, text_config

SHARED = "their weight is used in two places"
HELPER = "they belong to an adapter; merge it before, or it stays beside the quantized layer"
OUTSIDE = "no text reaches them, as they are outside of the language model"
BYPASSED = "the model reads or writes their weight itself, instead of calling the layer"


def linear_layers(model: nn.Module, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that `quantize` would replace, if `read_or_written` finds nothing against it."""
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
        # Subclasses that compute something else (routers, adapters) stay; Falcon's is a linear map, written out.
        is_linear = isinstance(module, nn.Linear) and (
            type(module).forward is nn.Linear.forward or type(module).__name__ == "FalconLinear"
        )
        skipped = module is head or any(part in name for part in skip)
        if (is_linear or is_conv1d) and not skipped and (count := uses[id(module.weight)]):
            why = {SHARED: count > 1, HELPER: module in helpers, OUTSIDE: inside is not None and module not in inside}
            yield name, module, next((reason for reason, holds in why.items() if holds), "")


def _language_model(model: nn.Module) -> set[nn.Module] | None:
    """The modules that text goes through, where the config says that there are others; else None."""
    config = getattr(model, "config", None)
    if text_config(model) is config or not callable(getattr(model, "get_decoder", None)):
        return None
    return set(model.get_decoder().modules())


def _helpers(model: nn.Module) -> set[nn.Module]:
    """What adapters put beside the layer that they adapt, which peft calls base_layer."""
    return {
        helper
        for module in model.modules()
        if isinstance(getattr(module, "base_layer", None), nn.Module)
        for name, child in module.named_children()
        if name != "base_layer"
        for helper in child.modules()
    }


class _Watch(TorchDispatchMode):
    """Notes the layers whose weight goes into an operation while their forward does not run."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        self.names = {layer.weight.data_ptr(): name for name, layer in layers.items()}
        self.running: list[str] = []
        self.found: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler for this, which takes seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:  # others need not have an address
                continue
            if (name := self.names.get(x.data_ptr())) and name not in self.running:
                self.found.add(name)
        return func(*args, **(kwargs or {}))


def read_or_written(model: nn.Module, layers: Mapping[str, nn.Module], ids: Tensor) -> dict[str, str]:
    """Names of those `layers` whose weight the model uses without calling them, with BYPASSED for each.

    Runs token ids [B, T] through the model in training mode and in evaluation mode, since some models rescale weights
    when the mode changes. Modes, buffers and the random state are as before afterwards. Raises what the model raises
    in evaluation mode.
    """
    watch = _Watch(layers)
    with keep_modes(model), torch.no_grad(), _told_of_calls(layers, watch.running), watch:
        with _restored(model), suppress(Exception):  # a model that cannot be trained has no such switch
            run(model.train(), ids)
        run(model.eval(), ids)
    return {name: BYPASSED for name in layers if name in watch.found}


@contextmanager
def _told_of_calls(layers: Mapping[str, nn.Module], running: list[str]) -> Iterator[None]:
    """Keeps the names of layers whose forward runs in `running`. Not by hooks: torch's encoder layers avoid those."""

    def noted(name: str, forward: Callable) -> Callable:
        def call(*args, **kwargs):
            running.append(name)
            try:
                return forward(*args, **kwargs)
            finally:
                running.pop()

        return call

    own = {name: layer.__dict__.get("forward") for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.forward = noted(name, layer.forward)
        yield
    finally:
        for name, layer in layers.items():
            layer.__dict__.pop("forward", None)
            if own[name] is not None:
                layer.forward = own[name]


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Afterwards buffers (running means, say) and the random generators are as before."""
    buffers = [
        (module, key, buffer, buffer.clone())
        for module in model.modules()
        for key, buffer in module.named_buffers(recurse=False)
    ]
    device = input_device(model)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of training without gradients
            yield
    finally:
        for module, key, buffer, before in buffers:
            module._buffers[key] = buffer.copy_(before)
