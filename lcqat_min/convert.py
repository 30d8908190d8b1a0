"""Quantize a causal language model in place: moments, rotation, rounding with feedback, swapped layers.

    teacher = copy.deepcopy(model)                       # keep the unquantized model to distil from
    report = quantize(model, batches, QuantConfig())     # PTQ: a good start
    train(model, more_batches, TrainConfig(), teacher)   # QAT: see train.py

Every linear map whose weight is its own (nn.Linear, and transformers' Conv1D with its transposed weight) is
replaced by a QuantLinear that decodes its weight from 2-bit codes. Left as they are: embeddings, norms, the
output head (it shares its weight with the embeddings in most small models), experts that are fused into one
3-d parameter, and layers whose name contains one of `config.skip`.

Steps for each layer: second moments of its inputs from the unquantized model; rotate W and H; pad the inputs
to whole vectors; fit a codebook to the weights, each row divided by its root mean square; round with
feedback; refit (A, b) to the outputs and round again, as long as that lowers the proxy loss. Same seed, same
codes, bit by bit, on one machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from . import codebook as cb
from .calibrate import SMALLEST_SCALE, Factor, Rounded, factorize, refit, round_matrix, row_scales, second_moments
from .linear import AffineLinear, QuantLinear, StepLinear, TableLinear
from .lloyd import fit, mean_squared_error, table_start
from .rotate import random_signs, rotate
from .rounding import ESTIMATORS

CODEBOOKS = ("scalar", "lattice", "planes", "step", "table")
ROTATIONS = ("none", "input", "both")
SCALES = ("search", "max")
MOMENTS_BYTES = 8 << 30  # second moments held at a time; layers that do not fit take another pass
FIT_VECTORS = 1 << 14  # weight vectors of a matrix that its codebook is fitted to,
FIT_ROUNDS = 8  # in so many rounds
STARTS = 8  # random ones of small untied planes: for d = 2 most fits end at 0.115, the better ones at 0.1105


@dataclass(frozen=True)
class QuantConfig:
    """What to quantize to, and from which start. 2 bits a weight throughout.

    codebook      scalar: 4 uniform levels.  lattice: A [d, d] on {0..3}^d, the paper's form.  planes:
                  A [d, 2d] on {-1, +1}^2d, untied.  step: scalar with a learned step (LSQ).  table: 4^d
                  entries, one table for the model.
    dim           d, weights in a vector (lattice, planes, table); 4 makes a byte a vector
    rotate        none | input | both: where the block-Hadamard rotation acts
    feedback      carry rounding errors (LDLQ) or round plainly
    damping       added to the diagonal of the second moments, as a share of its mean; raised when needed
    scale         search: the best of several row scales; max: half a row's largest weight (ParetoQ's start)
    refits        rounds of fitting (A, b) to the layer's outputs and of rounding again at scales nearby
    estimator     gradient through the rounding: ste | clipped | dge (step: always clipped; table: none)
    learn_codebook  train A and b, or the table; step has neither
    start_on_codes  latents start on the codes (LC-QAT's release), not at the unrounded targets (step: never)
    skip          parts of the names of layers that stay unquantized
    seed          of the random signs and of the codebook fit
    """

    codebook: str = "planes"
    dim: int = 4
    rotate: str = "both"
    feedback: bool = True
    damping: float = 0.01
    scale: str = "search"
    refits: int = 1
    estimator: str = "ste"
    learn_codebook: bool = True
    start_on_codes: bool = False
    skip: tuple[str, ...] = ("lm_head",)
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"codebook": CODEBOOKS, "rotate": ROTATIONS, "estimator": ESTIMATORS, "scale": SCALES}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"QuantConfig.{name} is {value!r}; choose one of {', '.join(allowed)}")
        most = 8 if self.codebook in ("lattice", "planes") else 4
        if not 1 <= self.dim <= most:
            raise ValueError(f"QuantConfig.dim is {self.dim}; a {self.codebook} codebook takes 1 to {most} "
                             "weights a vector")
        if not 0 <= self.damping < 1 or self.refits < 0:
            raise ValueError(f"QuantConfig.damping is {self.damping} and refits {self.refits}; damping is a "
                             "share, from 0 to less than 1, and refits a count, 0 or more")
        if isinstance(self.skip, str):
            raise ValueError(f"QuantConfig.skip is the text {self.skip!r}; give a tuple: ({self.skip!r},)")

    @property
    def vector(self) -> int:
        """Weights in a vector of this codebook: 1 for the scalar kinds, else `dim`."""
        return 1 if self.codebook in ("scalar", "step") else self.dim


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


def quantize(model: nn.Module, batches: Iterable[Tensor], config: QuantConfig,
             progress: Callable[[Iterable], Iterable] = iter) -> list[LayerReport]:
    """Quantize `model` in place from calibration batches of token ids [B, T]; one report a layer.

    Nothing is swapped before all layers are rounded, so an error leaves the model as it was. `progress` may
    wrap the loop over layers (tqdm.tqdm). Raises ValueError for weights or inputs that are not finite, for a
    model without linear layers and for one that is quantized already, naming the layer.
    """
    layers = dict(linear_layers(model, config.skip))
    if not layers:
        raise ValueError(f"no linear layer to quantize: found none outside skip = {config.skip}"
                         + ("; this model is quantized already" if any(quant_layers(model)) else ""))
    for name, layer in layers.items():
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"the weight of {name!r} holds NaN or infinity; load or train the model again")
    batches = _checked(batches)
    generator = torch.Generator().manual_seed(config.seed)
    plan = {name: _signs(layer, config.rotate, generator) for name, layer in layers.items()}
    table = None
    if config.codebook == "table":
        table = nn.Parameter(_shared_table(layers, plan, config), requires_grad=config.learn_codebook)
    made: dict[str, QuantLinear] = {}
    reports: list[LayerReport] = []
    steps = (item for group in _groups(layers) for item in second_moments(model, group, batches).items())
    for name, moments in progress(_sized(steps, len(layers))):
        layer = layers[name]
        W, factor = _prepare(weight_of(layer), moments.H, plan[name], config)
        rounded = _round(W, factor, table, config)
        made[name] = _layer(layer, rounded, plan[name], table, config)
        total = ((W @ factor.H) * W).sum().item()
        share = rounded.loss.sum().item() / total if total > 0 else 0.0
        dead = int((moments.H.diagonal() == 0).sum())  # factor.dead is of rotated, padded inputs
        shape = (made[name].out_features, made[name].in_features)
        reports.append(LayerReport(name, shape, share, factor.damping, dead, moments.tokens))
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return reports


def linear_layers(model: nn.Module, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that `quantize` would replace: a weight that is used in two places stays as it is."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        skipped = module is head or any(part in name for part in skip)
        if (isinstance(module, nn.Linear) or is_conv1d) and not skipped and uses[id(module.weight)] == 1:
            yield name, module


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Names and modules of the quantized layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear))


def weight_of(layer: nn.Module) -> Tensor:
    """The weight as fp32 [out, in]; transformers' Conv1D stores the transpose."""
    weight = layer.weight.detach().float()
    return weight if isinstance(layer, nn.Linear) else weight.T


@lru_cache(maxsize=8)
def normal_codebook(kind: str, dim: int, seed: int) -> cb.Codebook:
    """The codebook of a kind fitted to N(0, 1) weights: where every fit starts, made once (takes seconds)."""
    generator = torch.Generator().manual_seed(seed)
    if kind in ("scalar", "step"):
        return cb.scalar()
    if kind == "lattice":
        return cb.lattice(dim)
    x = torch.randn(30_000, dim, generator=generator)
    if kind == "table":
        return fit(x, table_start(x, 4**dim, generator), rounds=20)
    if dim == 4:
        return cb.frame_planes()
    if dim < 4:
        books = [fit(x, cb.random_planes(dim, generator), rounds=40) for _ in range(STARTS)]
        return min(books, key=lambda book: mean_squared_error(x, book))
    half = normal_codebook(kind, dim // 2, seed)  # two of half the size side by side, then free
    rest = normal_codebook(kind, dim - dim // 2, seed)
    A = torch.block_diag(half.A, rest.A) + 0.05 * torch.randn(dim, 2 * dim, generator=generator)
    return fit(x[:12_000], cb.AffineCodebook(A, torch.cat([half.b, rest.b]), 2), rounds=30)


def _checked(batches: Iterable[Tensor]) -> list[Tensor]:
    batches = list(batches)
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.is_floating_point():
            got = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"a calibration batch is {got}; give batches of token ids, integers [B, T]: for "
                             "one tensor of windows [n, T] that is windows.split(8)")
    if not sum(batch.numel() for batch in batches):
        raise ValueError("there are no calibration tokens: give at least one batch of token ids [B, T]")
    return batches


def _signs(layer: nn.Module, where: str, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    rows, columns = weight_of(layer).shape
    device = layer.weight.device
    signs_in = random_signs(columns, generator).to(device) if where != "none" else None
    signs_out = random_signs(rows, generator).to(device) if where == "both" else None
    return signs_in, signs_out


def _rotated(W: Tensor, signs: tuple[Tensor | None, Tensor | None]) -> Tensor:
    signs_in, signs_out = signs
    W = W if signs_in is None else rotate(W, signs_in)
    return W if signs_out is None else rotate(W.T, signs_out).T.contiguous()


def _pad(x: Tensor, d: int) -> Tensor:
    return nn.functional.pad(x, (0, -x.shape[-1] % d))


def _prepare(W: Tensor, H: Tensor, signs: tuple, config: QuantConfig) -> tuple[Tensor, Factor]:
    """W and the factor of H in the basis of the codes, padded to whole vectors."""
    if signs[0] is not None:
        H = rotate(rotate(H, signs[0].double()).T, signs[0].double())
    n = len(H)
    H = _pad(_pad(H, config.vector).T, config.vector)
    H.diagonal()[n:] = 1e-9 * H.diagonal()[:n].mean()  # padding is cut off again: its error must not count
    return _pad(_rotated(W, signs), config.vector), factorize(H, config.damping)


def _normalized(W: Tensor, d: int) -> Tensor:
    """Vectors of W with each row divided by its root mean square: [rows * columns / d, d]."""
    return (W / W.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)).reshape(-1, d)


def _some(x: Tensor, count: int) -> Tensor:
    return x[:: -(-len(x) // count)]  # evenly spread, without randomness


def _shared_table(layers: dict, plan: dict, config: QuantConfig) -> Tensor:
    """One k-means table for the model: a table a layer would cost 0.1 to 0.3 bits a weight on a small one."""
    share = max(1, 4 * FIT_VECTORS // len(layers))
    rotated = (_pad(_rotated(weight_of(layer), plan[name]), config.dim) for name, layer in layers.items())
    x = torch.cat([_some(_normalized(W, config.dim), share).cpu() for W in rotated])
    start = normal_codebook("table", config.dim, config.seed)
    return fit(x, start, rounds=10).table.to(next(iter(layers.values())).weight.device)


def _round(W: Tensor, factor: Factor, table: nn.Parameter | None, config: QuantConfig) -> Rounded:
    """Round at the best of a few scales a row, then again near them; affine codebooks are refitted in between."""
    if table is not None:
        book = cb.TableCodebook(table.detach())
    else:
        book = normal_codebook(config.codebook, config.dim, config.seed).to(W.device)
    if config.scale == "max":
        return round_matrix(W, factor, book, [(W.abs().amax(1) / 2).clamp(min=SMALLEST_SCALE)], config.feedback)
    if fitted := config.codebook in ("lattice", "planes"):
        book = fit(_some(_normalized(W, config.dim), FIT_VECTORS), book, rounds=FIT_ROUNDS)
    best = round_matrix(W, factor, book, row_scales(W), config.feedback)
    for _ in range(config.refits):
        book = refit(W, best, factor.H) if fitted else best.codebook
        other = round_matrix(W, factor, book, [best.scale * near for near in (0.95, 1.0, 1.05)], config.feedback)
        if other.loss.sum() >= best.loss.sum():
            break
        best = other
    return best


def _layer(old: nn.Module, rounded: Rounded, signs: tuple, table: nn.Parameter | None,
           config: QuantConfig) -> QuantLinear:
    rows, columns = weight_of(old).shape
    common = (columns, rows, rounded, old.bias, *signs)
    if config.codebook == "table":
        return TableLinear(*common, table)
    if config.codebook == "step":
        return StepLinear(*common)
    return AffineLinear(*common, config.estimator, config.learn_codebook, config.start_on_codes)


def _groups(layers: dict[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Layers whose second moments fit in memory together, at least one at a time."""
    group: dict[str, nn.Module] = {}
    used = 0
    for name, layer in layers.items():
        size = 8 * weight_of(layer).shape[1] ** 2
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
