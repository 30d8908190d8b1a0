"""Calibration: the second moments of a layer's inputs, which say what an error in each of its weights costs.

A layer y = W x is quantized so that its *output* changes least. For an error E in its weights that change is, in
the mean over inputs, tr( E H E^T ) with the second moments of the inputs

    H = E[x x^T]        [n, n], fp64, estimated on a few thousand tokens

Rounding (ptq/ldlq.py) needs its Cholesky factor. H is damped (H + damping * mean(diag H) * I); when it is still not
positive definite (fewer tokens than inputs, doubled channels) the damping rises tenfold until it is, and
`Factor.damping` holds the value used. An input that was never active (H_ii = 0) gets the mean diagonal of the others:
its weights are rounded by themselves.

Limits: second moments come from the unquantized model, so a layer does not make up for the errors of earlier layers.
Training does.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..language_model import keep_modes, run


class Moments(NamedTuple):
    """H = E[x x^T], fp64 [n, n], over `tokens` inputs of a layer."""

    H: Tensor
    tokens: int


class Factor(NamedTuple):
    """H damped (fp32 [n, n]), its lower Cholesky factor C (fp64 [n, n]), the damping, inputs never active."""

    H: Tensor
    C: Tensor
    damping: float
    dead: int


@torch.inference_mode(False)  # else the moments could not be used outside
def second_moments(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Tensor]) -> dict[str, Moments]:
    """Run token batches [B, T] without padding through the model; return the second moments of each layer's inputs.

    Layers that are fed the same tensor (query, key and value, say) share the product; a layer that no input reaches,
    such as an expert that is never chosen, is left out. Raises ValueError where there are no batches, and with the
    layer's name where an input is not finite.
    """
    if not (batches := list(batches)):
        raise UsageError("second_moments: no batches; give at least one batch of token ids [B, T]")
    sums: dict[str, Tensor] = {}
    tokens: Counter[str] = Counter()
    latest: list = [None, 0, None]  # the last input, how often it had been changed in place, its x^T x

    def add(name: str, layer: nn.Module, args: tuple, named: dict) -> None:
        x = args[0] if args else named["input"]
        if x is not latest[0] or x._version != latest[1]:
            rows = x.detach().reshape(-1, x.shape[-1]).double()
            latest[:] = x, x._version, rows.T @ rows
        sums[name] = sums[name].add_(latest[2]) if name in sums else latest[2].clone()
        tokens[name] += x.numel() // x.shape[-1]

    with keep_modes(model), torch.no_grad(), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(add, name), with_kwargs=True))
        model.eval()
        for batch in batches:
            run(model, batch)
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise UsageError(f"layer {name!r} was fed NaN or infinity: check the model's weights and dtype")
    return {name: Moments(total.div_(tokens[name]), tokens[name]) for name, total in sums.items() if tokens[name]}


def factorize(H: Tensor, damping: float = 0.01) -> Factor:
    """Damp H [n, n] and factor it, raising the damping tenfold as often as needed.

    Raises ValueError for NaN, infinity or numbers beyond fp32 in H.
    """
    H = H.double()
    if not torch.isfinite(H.float()).all():
        raise UsageError("second moments hold NaN or infinity, or numbers beyond fp32: check the text and the weights")
    dead = H.diagonal() <= 0
    mean = H.diagonal()[~dead].mean() if not dead.all() else H.new_ones(())
    while True:
        damped = H.clone()
        damped.diagonal().add_(dead * mean).add_(damping * mean)
        C, failed = torch.linalg.cholesky_ex(damped)
        if not failed and torch.isfinite(C).all():
            return Factor(damped.float(), C, damping, int(dead.sum()))
        damping = max(10 * damping, 1e-6)
