"""Quantize a causal language model in place: every linear layer becomes a layer with 2-bit codes.

    teacher = copy.deepcopy(model)                       # keep the unquantized model to distil from
    report = quantize(model, batches, LCQAT())           # PTQ: a good start
    train(model, more_batches, TrainConfig(), teacher)   # QAT: see qat/loop.py

Every linear map whose weight is its own (nn.Linear, and transformers' Conv1D with its transposed weight) is
replaced by a QuantLinear that decodes its weight from 2-bit codes. Left as they are: embeddings, norms, the
output head (it shares its weight with the embeddings in most small models), experts that are fused into one
3-d parameter, and layers whose name contains one of `skip` (routers of experts are linear layers, too);
with a warning, what ptq/select.py lists. A layer that no calibration token reaches, such as an expert that is never
chosen, is rounded plainly, with a warning.

Steps: second moments of the inputs of each layer, from the unquantized model; each weight quantized by the
method (ptq/method.py); then all layers are replaced. Same seed, same codes, bit by bit, on one machine.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..language_model import Batch, check_model, read_batch, without_padding
from ..layer.linear import QuantLinear
from ..layer.units import in_units
from .lcqat import LCQAT
from .ldlq import proxy_loss
from .method import Method
from .moments import Moments, second_moments
from .select import left_alone, linear_layers, read_or_written

QUANT_METHOD = "lcqat_min.hf"  # `quant_method` in config.json: also the module that teaches transformers to read it
IN_TRAINING = {"quant_method": QUANT_METHOD, "version": "in training"}
MOMENTS_BYTES = 8 << 30  # second moments held at a time; layers that do not fit take another pass of the model


@dataclass(frozen=True)
class LayerReport:
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
    skip: tuple[str, ...] = ("lm_head",),
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[LayerReport]:
    """Quantize `model` in place from calibration batches of token ids [B, T]; returns one report per layer.

    method: LCQAT() where none is given. skip: parts of the names of layers that stay unquantized. seed: of all that is
    random. progress: may wrap the loop over layers (tqdm.tqdm).

    No layer is replaced before all are rounded, so an error leaves the model as it was. Batches with padding are given
    as the tokenizer makes them (language_model.py). Save the result with packing.save_packed or with a checkpoint of
    `train`: save_pretrained does not know these layers, and the model's config is marked, so that what it writes is
    refused rather than loaded in part. Raises UsageError for weights or inputs that are not finite, with the name of
    the layer; for a model without linear layers; for one that is quantized already or is not a causal language model.
    """
    if isinstance(skip, str):
        raise UsageError(f"skip is the text {skip!r}; give a tuple: ({skip!r},)")
    layers, left = dict(linear_layers(model, skip)), left_alone(model, skip)
    if layers:
        texts = _checked(batches, model, layers)
        left |= read_or_written(model, layers, texts[0][:1])
        layers = {name: layer for name, layer in layers.items() if name not in left}
    _say_what_is_left(left)
    if not layers:
        quantized = any(getattr(module, "is_quantized", False) for module in model.modules())
        already = "; this model is quantized already" if quantized else ""
        raise UsageError(f"no linear layer to quantize: found none outside of skip = {skip}{already}")
    with torch.autocast(next(iter(layers.values())).weight.device.type, enabled=False):  # scales and codes in fp32
        return _quantize(model, layers, texts, method or LCQAT(), seed, progress)


def _quantize(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: list[Tensor],
    method: Method,
    seed: int,
    progress: Callable[[Iterable], Iterable],
) -> list[LayerReport]:
    generator = torch.Generator().manual_seed(seed)
    method = method.start(list(layers.values()), generator)
    made: dict[str, QuantLinear] = {}
    reports: list[LayerReport] = []
    found = (moments for group in _groups(layers) for moments in _moments(model, group, batches))
    for name, moments in zip(progress(layers), found, strict=False):
        W, H = weight_of(layers[name]), moments.H
        made[name] = layer = method.layer(W, H, layers[name].bias, generator)
        if not torch.isfinite(weight := layer.weight.detach()).all():
            raise UsageError(
                f"the weight of {name!r} reaches {W.abs().max():.3g}: once rounded, it is more than fp32 holds. Load or "
                "train the model again, or name the layer in `skip`"
            )
        reports.append(_report(name, W, weight, moments))
    for name, layer in made.items():
        model.set_submodule(name, layer)
    mark(model)
    return reports


def _report(name: str, W: Tensor, weight: Tensor, moments: Moments) -> LayerReport:
    H, (W, unit) = in_units(moments.H)[0].float(), in_units(W)
    total = proxy_loss(W, H).sum().item()
    loss = proxy_loss(weight / unit - W, H).sum().item() / total if total > 0 else 0.0
    dead = int((moments.H.diagonal() == 0).sum())
    return LayerReport(name, (W.shape[0], W.shape[1]), loss, dead, moments.tokens)


def mark(model: nn.Module) -> None:
    """Say in a transformers model's config that its layers are in training: its architecture has others.

    In a config of its own: another model, its teacher perhaps, may have been built from the same one.
    """
    shared = getattr(model, "config", None)
    if callable(getattr(shared, "save_pretrained", None)):
        own = copy.copy(shared)
        own.quantization_config = dict(IN_TRAINING)
        for module in model.modules():
            if getattr(module, "config", None) is shared:
                module.config = own


def weight_of(layer: nn.Module) -> Tensor:
    """The weight as fp32 [out, in]; transformers' Conv1D stores the transpose."""
    weight = layer.weight.detach().float()
    return weight if isinstance(layer, nn.Linear) else weight.T


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """[out, in] of a weight."""
    shape = tuple(layer.weight.shape)
    return shape if isinstance(layer, nn.Linear) else shape[::-1]


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
        raise UsageError(
            "there are no calibration tokens: give at least one batch of token ids [B, T] (an iterator "
            "gives its batches only once)"
        )
    return texts


def _say_what_is_left(left: dict[str, str]) -> None:
    for why, count in Counter(left.values()).items():
        named = [name for name, reason in left.items() if reason == why]
        some = ", ".join(named[:4]) + (f" and {count - 4} more" if count > 4 else "")
        warnings.warn(f"not quantized: {some}; {why}", RuntimeWarning, stacklevel=4)


def _moments(model: nn.Module, layers: dict[str, nn.Module], batches: list[Tensor]) -> Iterator[Moments]:
    """Second moments of each layer; for layers that no token reaches the identity, which is plain rounding."""
    found = second_moments(model, layers, batches)
    if missing := [name for name in layers if name not in found]:
        warnings.warn(
            f"no calibration token reached {', '.join(missing)}: rounded without error feedback. Give more "
            "text, or name them in `skip`",
            RuntimeWarning,
            stacklevel=3,
        )
    for name, layer in layers.items():
        if name not in found:
            eye = torch.eye(shape_of(layer)[1], dtype=torch.float64, device=layer.weight.device)
            found[name] = Moments(eye, tokens=0)
        yield found.pop(name)


def _groups(layers: dict[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Layers whose second moments fit in memory together, at least one at a time."""
    group: dict[str, nn.Module] = {}
    used = 0
    for name, layer in layers.items():
        size = 8 * shape_of(layer)[1] ** 2
        if group and used + size > MOMENTS_BYTES:
            yield group
            group, used = {}, 0
        group[name] = layer
        used += size
    if group:
        yield group
