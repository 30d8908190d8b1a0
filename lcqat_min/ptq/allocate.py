"""Bits where they count: a rate for each layer, such that the average stays within a budget.

At R bits per weight a quantizer of normal weights loses about 4^-R of their energy, whatever its codebook: no code can
lose less, and good ones lose a fixed factor more. What a layer's loss does to the model is measured: round this layer
alone to a scalar grid of 2 bits, and see how far the model's predictions move.

    gain_l      KL(model || model with layer l rounded), nats per token           on a few calibration texts
    loss(R)  =  sum_l gain_l 4^(2 - R_l)        small losses add up: rounding all costs about the sum of the gains

The rates that make this smallest for a sum of bits are those at which another bit gains the same everywhere. Here rates
are few, so bits are spent greedily: all layers start at the lowest rate, and the layer in which the next rate saves
most per bit takes it, as long as the budget lasts. On a convex curve that is the optimum up to the last step. BAQ
(arXiv 2506.05664) solves the same problem for real rates, Q-Palette (2509.20214) for measured curves.

    bits = allocate(model, batches, budget=2.5)
    quantize(model, batches, Trellis(), changes={name: {"bits": rate} for name, rate in bits.items()})

The gains have to be those of the model. Spending by the proxy losses of the layers, absolute or as shares of their
outputs, gave a model that was worse than with the same rate everywhere (`scripts/ablate.py bits`).

Limits: one forward pass for each layer and text. One bit costs more than 4^-R says, so it is used only where the budget
is below 1.5.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..language_model import Batch, keep_modes, logits_of
from ..layer.linear import in_units
from .lcqat import LCQAT
from .model import layers_and_texts, moments_of, weight_of

RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
PROBE = LCQAT(codebook="scalar", refits=0, sweeps=0)
PROBE_TOKENS = 4096


def allocate(
    model: nn.Module,
    batches: Iterable[Batch],
    budget: float,
    *,
    skip: tuple[str, ...] = ("lm_head",),
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, float]:
    """Bits per weight for each layer that `quantize` would replace: at most `budget` on average over all weights.

    The model is as before when this returns. Batches, skip, seed and progress as for `quantize`. UsageError for a
    budget below the lowest of RATES.
    """
    rates = RATES if budget < RATES[1] else RATES[1:]
    spent({}, {}, budget, rates)  # refuses a budget before the work
    layers, texts = layers_and_texts(model, batches, skip)
    generator, gains = torch.Generator().manual_seed(seed), dict[str, float]()
    few = [text for i, text in enumerate(texts) if sum(t.numel() for t in texts[:i]) < PROBE_TOKENS]
    with keep_modes(model), torch.no_grad():
        reference = _log_probabilities(model, few)
        for name, (H, _) in zip(progress(layers), moments_of(model, layers, texts), strict=False):
            W, unit = in_units(weight_of(layers[name]))
            rounded = unit * PROBE.layer(W, H / in_units(H)[1], None, generator).weight
            weight = layers[name].weight
            whole = weight.data
            try:
                weight.data = (rounded if rounded.shape == whole.shape else rounded.T).to(whole.dtype)
                pairs = zip(reference, _log_probabilities(model, few), strict=True)
                moved = [((p.exp() * (p - q)).sum(), len(p)) for p, q in pairs]
            finally:
                weight.data = whole
            gains[name] = (sum(total for total, _ in moved) / sum(count for _, count in moved)).item()
    return spent(gains, {name: layer.weight.numel() for name, layer in layers.items()}, budget, rates)


def _log_probabilities(model: nn.Module, texts: Sequence[Tensor]) -> list[Tensor]:
    """Of the next tokens of each text, fp32 [tokens, vocabulary]."""
    model.eval()
    return [logits_of(model, text, None).flatten(0, -2).float().log_softmax(-1) for text in texts]


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
        return gains[name] * (4**-now - 4**-then) / ((then - now) * sizes[name])

    while True:
        costs = {name: (above[rate] - rate) * sizes[name] for name, rate in chosen.items() if rate in above}
        if not (fitting := [name for name, cost in costs.items() if cost <= left]):
            return chosen
        best = max(fitting, key=saved_per_bit)
        left -= costs[best]
        chosen[best] = above[chosen[best]]
