"""Mistakes that the checks of notebook 13 must catch."""

import torch

from lcqat_min.codebook.digits import digits_of


def around_the_end(bits, taps):
    """The first bits follow the last weight."""
    return sum(bits.roll(-ahead, 0) @ tap for ahead, tap in enumerate(taps))


def bits_of_the_weight_before(bits, taps):
    weights = torch.zeros(len(bits))
    for back, tap in enumerate(taps[: len(bits)]):
        weights[back:] += bits[: len(bits) - back] @ tap
    return weights


def reach_one_only(bits, taps):
    weights = bits @ taps[0]
    if len(taps) > 1:
        weights[:-1] += bits[1:] @ taps[1]
    return weights


def last_weights_left_out(bits, taps):
    n, reach = len(bits), len(taps) - 1
    return sum(bits[ahead : n - reach + ahead] @ tap for ahead, tap in enumerate(taps))


def _values(taps):
    bits = digits_of(torch.arange(4), 2, 2)
    return (bits @ taps[0])[:, None] + bits @ taps[1]  # [own, later]


def _least(ways, dim=1):
    least = ways.min(dim)
    return least.values, least.indices


def costs_of_the_past_forgotten(cost, w, taps):
    return _least((w - _values(taps)).square() + 0 * cost)


def minimum_over_own_bits(cost, w, taps):
    return _least(cost + (w - _values(taps)).square(), dim=0)


def costs_along_own_bits(cost, w, taps):
    return _least(cost[:, None] + (w - _values(taps)).square())


def not_squared(cost, w, taps):
    return _least(cost + (w - _values(taps)).abs())


def costs_only(cost, w, taps):
    return _least(cost + (w - _values(taps)).square())[0]


def came_from_by_old_cost(cost, w, taps):
    least = _least(cost + (w - _values(taps)).square())[0]
    return least, cost.argmin().expand(4)


def the_decoding_filter(x, taps):
    """Looks ahead, as decoding does, instead of back."""
    n, folded = x.shape[1], torch.zeros(*x.shape, 2)
    for ahead, tap in enumerate(taps[:n]):
        folded[:, : n - ahead] += x[:, ahead:, None] * tap
    return folded


def around_the_start(x, taps):
    return sum(x.roll(back, 1)[..., None] * tap for back, tap in enumerate(taps))


def own_tap_only(x, taps):
    return x[..., None] * taps[0]


def bits_first(x, taps):
    n, folded = x.shape[1], torch.zeros(len(x), 2, x.shape[1])
    for back, tap in enumerate(taps[:n]):
        folded[:, :, back:] += x[:, None, : n - back] * tap[:, None]
    return folded


WRONG = {
    "decode_overlap": [around_the_end, bits_of_the_weight_before, reach_one_only, last_weights_left_out],
    "viterbi_step": [
        costs_of_the_past_forgotten,
        minimum_over_own_bits,
        costs_along_own_bits,
        not_squared,
        costs_only,
        came_from_by_old_cost,
    ],
    "fold_overlap": [the_decoding_filter, around_the_start, own_tap_only, bits_first],
}
