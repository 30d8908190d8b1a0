"""Bits where they count: a rate for each layer, such that the average stays within a budget.

At R bits per weight a quantizer of normal weights loses about 2^(-2R) of their energy, whatever its codebook (the best
that is possible is just that). Rounding with feedback then costs layer l about

    loss_l(R) = gain_l 2^(-2R)        gain_l = sum_k |C_kk|^2 * mean_k of |W|^2       H = C C^T     (ptq/ldlq.py)

and the rates that make the sum of all losses smallest for a sum of bits are those at which another bit gains the same
everywhere. Here rates are few, so bits are spent greedily: all layers start at the lowest rate, and the layer in which
a step to a higher rate saves most per bit takes it, as long as the budget lasts. On a convex curve that is the optimum
up to the last step. BAQ (arXiv 2506.05664) solves the same problem for real rates; Q-Palette (2509.20214) for measured
curves of each quantizer.

    bits = allocate(model, batches, Trellis(), budget=2.5)
    quantize(model, batches, Trellis(), changes={name: {"bits": rate} for name, rate in bits.items()})

Limits: a loss in the output of one layer counts as much as the same in any other, relative to the energy of that
output.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

from ..errors import UsageError
from ..language_model import Batch
from ..layer.linear import in_units
from .method import Method
from .model import layers_and_texts, moments_of, weight_of

RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


def allocate(
    model: nn.Module,
    batches: Iterable[Batch],
    method: Method,
    budget: float,
    *,
    skip: tuple[str, ...] = ("lm_head",),
    seed: int = 0,
) -> dict[str, float]:
    """Bits per weight for each layer that `quantize` would replace: at most `budget` on average over all weights.

    The model is not changed. Batches as for `quantize`. UsageError for a budget below the lowest of RATES.
    """
    layers, texts = layers_and_texts(model, batches, skip)
    generator, gains, sizes = torch.Generator().manual_seed(seed), dict[str, float](), dict[str, int]()
    for name, (H, _) in zip(layers, moments_of(model, layers, texts), strict=True):
        W = in_units(weight_of(layers[name]))[0]
        W_r, factor = method.prepare(W, H / in_units(H)[1], method.signs(W, generator), 1)
        energy = ((W_r @ factor.H) * W_r).double().sum()
        gains[name] = (factor.C.diagonal().square().sum() * W_r.double().square().sum() / len(H) / energy).item()
        sizes[name] = W.numel()
    return spent(gains, sizes, budget)


def spent(
    gains: Mapping[str, float], sizes: Mapping[str, int], budget: float, rates: Sequence[float] = RATES
) -> dict[str, float]:
    """One of the ascending `rates` for each layer of these gains and sizes: at most `budget` on average."""
    if budget < rates[0]:
        raise UsageError(f"a budget of {budget} bits per weight is below the lowest rate, {rates[0]}")
    chosen, left = dict.fromkeys(gains, rates[0]), (budget - rates[0]) * sum(sizes.values())
    above = dict(pairwise(rates))

    def saved_per_bit(name: str) -> float:
        now, then = chosen[name], above[chosen[name]]
        return gains[name] * (2 ** (-2 * now) - 2 ** (-2 * then)) / ((then - now) * sizes[name])

    while True:
        costs = {name: (above[rate] - rate) * sizes[name] for name, rate in chosen.items() if rate in above}
        if not (fitting := [name for name, cost in costs.items() if cost <= left]):
            return chosen
        best = max(fitting, key=saved_per_bit)
        left -= costs[best]
        chosen[best] = above[chosen[best]]
