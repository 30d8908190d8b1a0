"""Quantize a causal language model in place: every linear layer becomes a layer with 2-bit codes.

    teacher = copy.deepcopy(model)                       # keep the unquantized model to distil from
    report = quantize(model, batches, QuantConfig())     # PTQ: a good start
    train(model, more_batches, TrainConfig(), teacher)   # QAT: see qat/loop.py

Every linear map whose weight is its own (nn.Linear, and transformers' Conv1D with its transposed weight) is
replaced by a QuantLinear that decodes its weight from 2-bit codes. Left as they are: embeddings, norms, the
output head (it shares its weight with the embeddings in most small models), experts that are fused into one
3-d parameter, and layers whose name contains one of `config.skip` (routers of experts are linear layers, too);
with a warning, what ptq/select.py lists. A layer that no calibration token reaches, such as an expert that is never
chosen, is rounded plainly, with a warning.

Steps: second moments of the inputs of each layer, from the unquantized model; each weight rounded as ptq/matrix.py
says; then all layers are swapped. Same seed, same codes, bit by bit, on one machine.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..codebook.lloyd import fit
from ..codebook.matrix import Rounded
from ..errors import UsageError
from ..language_model import Batch, check_model, longest_window, read_batch, vocabulary, without_padding
from ..layer.linear import AffineLinear, QuantLinear, StepLinear, TableLinear
from ..layer.rotation import random_signs
from .matrix import (
    FIT_VECTORS,
    QuantConfig,
    in_units,
    normal_codebook,
    pad,
    prepare,
    rotated,
    round_layer,
    sample_vectors,
)
from .moments import Moments, second_moments
from .select import left_alone, linear_layers, read_or_written

__all__ = ["linear_layers", "longest_window", "quant_layers", "quantize", "vocabulary"]

METHOD = "lcqat_min.hf"  # `quant_method` in config.json: also the module that teaches transformers to read it
IN_TRAINING = {"quant_method": METHOD, "version": "in training"}
MOMENTS_BYTES = 8 << 30  # second moments held at a time; layers that do not fit take another pass of the model


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer: its shape [out, in], proxy loss as a share of tr(W H W^T), damping used, how many
    inputs were never active (before rotation) and how many tokens were seen."""

    name: str
    shape: tuple[int, int]
    loss: float
    damping: float
    dead: int
    tokens: int


@torch.inference_mode(False)  # else the new layers could not be trained
def quantize(
    model: nn.Module, batches: Iterable[Batch], config: QuantConfig, progress: Callable[[Iterable], Iterable] = iter
) -> list[LayerReport]:
    """Quantize `model` in place from calibration batches of token ids [B, T]; one report a layer.

    Nothing is swapped before all layers are rounded, so an error leaves the model as it was. Afterwards save it
    with pack.save_packed or a checkpoint of `train`: save_pretrained knows nothing of these layers, and the model's
    config is marked, so that what it writes is refused rather than loaded half. Batches with padding are given as
    the tokenizer makes them (language_model.py). `progress` may wrap the loop over layers (tqdm.tqdm). Raises
    ValueError for weights or inputs that are not finite, naming the layer, for a model without linear layers, for one
    that is quantized already and for one that is no causal language model.
    """
    layers, left = dict(linear_layers(model, config.skip)), left_alone(model, config.skip)
    if layers:
        texts = _checked(batches, model, layers)
        left |= read_or_written(model, layers, texts[0][:1])
        layers = {name: layer for name, layer in layers.items() if name not in left}
    _say_what_is_left(left)
    if not layers:
        raise UsageError(
            f"no linear layer to quantize: found none outside skip = {config.skip}"
            + ("; this model is quantized already" if _is_quantized(model) else "")
        )
    with torch.autocast(next(iter(layers.values())).weight.device.type, enabled=False):  # scales and codes in fp32
        return _quantize(model, layers, texts, config, progress)


def _quantize(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: list[Tensor],
    config: QuantConfig,
    progress: Callable[[Iterable], Iterable],
) -> list[LayerReport]:
    generator = torch.Generator().manual_seed(config.seed)
    plan = {name: _signs(layer, config.rotate, generator) for name, layer in layers.items()}
    table = None
    if config.codebook == "table":
        table = nn.Parameter(_shared_table(layers, plan, config), requires_grad=config.learn_codebook)
    made: dict[str, QuantLinear] = {}
    reports: list[LayerReport] = []
    steps = (item for group in _groups(layers) for item in _moments(model, group, batches))
    for name, moments in progress(_sized(steps, len(layers))):
        layer = layers[name]
        W, unit = in_units(weight_of(layer))
        W, factor = prepare(W, in_units(moments.H)[0], plan[name], config)
        rounded = round_layer(W, factor, table, config)
        made[name] = _layer(layer, replace(rounded, scale=rounded.scale * unit), plan[name], table, config)
        if not torch.isfinite(made[name].weight).all():
            raise UsageError(
                f"the weight of {name!r} reaches {layer.weight.abs().max():.3g}: once rounded, it is more "
                "than fp32 holds. Load or train the model again, or name the layer in QuantConfig.skip"
            )
        total = ((W @ factor.H) * W).sum().item()
        share = rounded.loss.sum().item() / total if total > 0 else 0.0
        dead = int((moments.H.diagonal() == 0).sum())  # factor.dead is of rotated, padded inputs
        shape = (made[name].out_features, made[name].in_features)
        reports.append(LayerReport(name, shape, share, factor.damping, dead, moments.tokens))
    for name, layer in made.items():
        model.set_submodule(name, layer)
    mark(model)
    return reports


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


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Names and modules of the quantized layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear))


def weight_of(layer: nn.Module) -> Tensor:
    """The weight as fp32 [out, in]; transformers' Conv1D stores the transpose."""
    weight = layer.weight.detach().float()
    return weight if isinstance(layer, nn.Linear) else weight.T


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """[out, in] of a weight."""
    shape = tuple(layer.weight.shape)
    return shape if isinstance(layer, nn.Linear) else shape[::-1]


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QuantLinear) or type(module).__name__ == "PackedLinear" for module in model.modules())


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


def _signs(layer: nn.Module, where: str, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    rows, columns = shape_of(layer)
    device = layer.weight.device
    signs_in = random_signs(columns, generator).to(device) if where != "none" else None
    signs_out = random_signs(rows, generator).to(device) if where == "both" else None
    return signs_in, signs_out


def _shared_table(layers: dict, plan: dict, config: QuantConfig) -> Tensor:
    """One k-means table for the model: a table a layer would cost 0.1 to 0.3 bits a weight on a small one."""
    share = max(1, 4 * FIT_VECTORS // len(layers))
    matrices = (pad(rotated(in_units(weight_of(layer))[0], plan[name]), config.dim) for name, layer in layers.items())
    x = torch.cat([sample_vectors(W, config.dim, share).cpu() for W in matrices])
    start = normal_codebook("table", config.dim, config.seed)
    return fit(x, start, rounds=10).table.to(next(iter(layers.values())).weight.device)


def _layer(
    old: nn.Module, rounded: Rounded, signs: tuple, table: nn.Parameter | None, config: QuantConfig
) -> QuantLinear:
    rows, columns = shape_of(old)
    common = (columns, rows, rounded, old.bias, *signs)
    if config.codebook == "table":
        return TableLinear(*common, table)
    if config.codebook == "step":
        return StepLinear(*common)
    return AffineLinear(*common, config.estimator, config.learn_codebook, config.start_on_codes)


def _moments(model: nn.Module, layers: dict[str, nn.Module], batches: list[Tensor]) -> Iterator[tuple[str, Moments]]:
    """Second moments of each layer; for layers that no token reaches the identity, which is plain rounding."""
    found = second_moments(model, layers, batches)
    if missing := [name for name in layers if name not in found]:
        warnings.warn(
            f"no calibration token reached {', '.join(missing)}: rounded without error feedback. Give more "
            "text, or name them in QuantConfig.skip",
            RuntimeWarning,
            stacklevel=3,
        )
    for name, layer in layers.items():
        if name not in found:
            eye = torch.eye(shape_of(layer)[1], dtype=torch.float64, device=layer.weight.device)
            found[name] = Moments(eye, tokens=0)
        yield name, found.pop(name)


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


class _sized:
    """An iterator with a length, so that a progress bar knows its end."""

    def __init__(self, items: Iterator, length: int):
        self.items, self.length = items, length

    def __iter__(self) -> Iterator:
        return iter(self.items)

    def __len__(self) -> int:
        return self.length
