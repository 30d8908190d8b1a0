"""Quantize a causal language model in place: every linear layer becomes a layer with 2-bit codes.

    teacher = copy.deepcopy(model)                       # keep the unquantized model to distil from
    report = quantize(model, batches, LCQAT())           # PTQ: a good start
    train(model, more_batches, TrainConfig(steps=60), teacher)   # QAT: see qat/loop.py

Every linear map whose weight is its own (nn.Linear, and transformers' Conv1D with its transposed weight) is
replaced by a QuantLinear that decodes its weight from 2-bit codes. Left as they are: embeddings, norms, the
output head (it shares its weight with the embeddings in most small models), experts that are fused into one
3-d parameter, and layers whose name contains one of `skip` (routers of experts are linear layers, too);
with a warning, what ptq/select.py lists. A layer that no calibration token reaches, such as an expert that is never
chosen, is rounded plainly, with a warning.

Steps: second moments of the inputs of each layer, from the unquantized model; each weight quantized by the
method (ptq/method.py); then all layers are replaced. Same seed, same codes, bit by bit, on one machine.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..language_model import Batch, check_model, read_batch, without_padding
from ..layer.linear import in_units
from .lcqat import LCQAT
from .ldlq import proxy_loss
from .method import Method
from .moments import Moments, second_moments
from .select import left_alone, linear_layers, read_or_written

QUANT_METHOD = "lcqat_min.hf"  # `quant_method` in config.json: also the module that teaches transformers to read it
IN_TRAINING = {"quant_method": QUANT_METHOD, "version": "in training"}
MOMENTS_BYTES = 8 << 30  # second moments held at a time; layers that do not fit take another pass of the model


class LayerReport(NamedTuple):
    """One quantized layer: its shape [out, in]; the proxy loss tr(E H E^T) as a share of tr(W H W^T); how many inputs
    were never active; how many tokens were seen."""

    name: str
    shape: tuple[int, int]
    loss: float
    dead: int
    tokens: int


@torch.inference_mode(False)  # else the new layers could not be trained
def quantize(
    model: nn.Module,
    batches: Iterable[Batch],
    method: Method | None = None,
    *,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    skip: tuple[str, ...] = ("lm_head",),
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[LayerReport]:
    """Quantize `model` in place from calibration batches of token ids [B, T]; returns one report per layer.

    method: LCQAT() where none is given. changes: other settings of it for some layers, by a part of their names, such
    as {"down_proj": {"bits": 3}}; a whole name comes before parts. skip: parts of the names of layers that stay
    unquantized. seed: of all that is random. progress: may wrap the loop over layers (tqdm.tqdm).

    No layer is replaced before all are rounded, so an error leaves the model as it was. Batches with padding are given
    as the tokenizer makes them (language_model.py). Save the result with packing.save_packed or with a checkpoint of
    `train`: save_pretrained does not know these layers, and the model's config is marked, so that what it writes is
    refused rather than loaded in part. Raises UsageError for weights or inputs that are not finite, with the name of
    the layer; for a model without linear layers; for one that is quantized already or is not a causal language model.
    """
    if isinstance(skip, str):
        raise UsageError(f"skip is the text {skip!r}; give a tuple: ({skip!r},)")
    layers, texts = layers_and_texts(model, batches, skip)
    generator, method = torch.Generator().manual_seed(seed), method or LCQAT()
    made, reports = {}, []
    with torch.autocast(next(iter(layers.values())).weight.device.type, enabled=False):  # scales and codes in fp32
        methods = methods_of(method.start(list(layers.values()), generator), list(layers), changes or {})
        for name, (H, tokens) in zip(progress(layers), moments_of(model, layers, texts), strict=False):
            W, unit = in_units(weight_of(layers[name]))
            H /= in_units(H)[1]  # in place: it may take gigabytes
            made[name] = layer = methods[name].layer(W, H, layers[name].bias, generator)
            layer.set_row_scale(unit * layer.row_scale)
            if not torch.isfinite(weight := layer.weight.detach()).all():
                raise UsageError(f"{name!r} reaches {unit * W.abs().max():.3g}, too much for fp32: name it in `skip`")
            total, lost = (proxy_loss(E, H.float()).sum().item() for E in (W, weight / unit - W))
            dead = (H.diagonal() == 0).sum().item()
            reports.append(LayerReport(name, tuple(W.shape), lost / total if total else 0.0, dead, tokens))
    for name, layer in made.items():
        model.set_submodule(name, layer)
    mark(model)
    return reports


def methods_of(method: Method, layers: Sequence[str], changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Method]:
    """The method of each layer. UsageError for a change that no layer has, and for a setting that the method lacks."""
    if unused := [part for part in changes if not any(part in name for name in layers)]:
        raise UsageError(
            f"changes name {unused[0]!r}, which is part of no layer; the first are {', '.join(layers[:5])}"
        )
    found = {}
    for name in layers:
        part = name if name in changes else next((part for part in changes if part in name), None)
        try:
            found[name] = replace(method, **changes[part]) if part else method
        except TypeError as error:
            raise UsageError(f"changes[{part!r}]: {error}") from error
    return found


def weight_of(layer: nn.Module) -> Tensor:
    """The weight as fp32 [out, in]; transformers' Conv1D stores the transpose."""
    weight = layer.weight.detach().float()
    return weight if isinstance(layer, nn.Linear) else weight.T


def mark(model: nn.Module) -> None:
    """Say in a transformers model's config that its layers are in training: its architecture has others.

    In a config of its own: another model, its teacher perhaps, may have been built from the same one.
    """
    shared: Any = getattr(model, "config", None)
    if callable(getattr(shared, "save_pretrained", None)):
        own = copy.copy(shared)
        own.quantization_config = dict(IN_TRAINING)
        for module in model.modules():
            if getattr(module, "config", None) is shared:
                module.config = own


def layers_and_texts(model: nn.Module, batches: Iterable[Batch], skip: tuple[str, ...]) -> tuple[dict, list[Tensor]]:
    """The layers to quantize, by name, and the text of the batches; warns of what is left as it is."""
    layers, left, texts = dict(linear_layers(model, skip)), left_alone(model, skip), []
    if layers:
        texts = _checked(batches, model, layers)
        left |= read_or_written(model, layers, texts[0][:1])
    for why in dict.fromkeys(left.values()):
        names = [name for name, reason in left.items() if reason == why]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        warnings.warn(f"not quantized: {', '.join(names[:4])}{more}; {why}", RuntimeWarning, stacklevel=3)
    if not (layers := {name: layer for name, layer in layers.items() if name not in left}):
        quantized = any(callable(getattr(module, "indices", None)) for module in model.modules())
        already = "; this model is quantized already" if quantized else ""
        raise UsageError(f"no linear layer to quantize: found none outside of skip = {skip}{already}")
    return layers, texts


def _checked(batches: Iterable[Batch], model: nn.Module, layers: dict[str, nn.Module]) -> list[Tensor]:
    """The text of the batches, if it and the layers are what `quantize` can use."""
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise UsageError(f"the weight of {name!r} is not in memory (meta device, or offloaded): load it whole")
        if not torch.isfinite(layer.weight).all():
            raise UsageError(f"the weight of {name!r} holds NaN or infinity; load or train the model again")
    check_model(model)
    texts = [text for batch in batches for text in without_padding(*read_batch(batch, model, "calibration"))]
    if not (texts := [text for text in texts if text.numel()]):
        raise UsageError("no calibration tokens: give at least one batch of token ids [B, T] (an iterator ends once)")
    return texts


def moments_of(model: nn.Module, layers: dict[str, nn.Module], texts: list[Tensor]) -> Iterator[Moments]:
    """Second moments of each layer; for layers that no token reaches the identity, which is plain rounding.

    As many layers at a time as MOMENTS_BYTES holds, and at least one.
    """
    inputs, left = {name: weight_of(layer).shape[1] for name, layer in layers.items()}, list(layers)
    while left:
        sizes = accumulate(8 * inputs[name] ** 2 for name in left)  # bytes of each and all before it
        fitting = max(1, sum(size <= MOMENTS_BYTES for size in sizes))
        group, left = left[:fitting], left[fitting:]
        found = second_moments(model, {name: layers[name] for name in group}, texts)
        if missing := [name for name in group if name not in found]:
            why = "rounded without error feedback. Give more text, or name them in `skip`"
            warnings.warn(f"no calibration token reached {', '.join(missing)}: {why}", RuntimeWarning, stacklevel=3)
        for name in group:
            if name in missing:
                found[name] = Moments(torch.eye(inputs[name]).to(layers[name].weight.device).double(), tokens=0)
            yield found.pop(name)
