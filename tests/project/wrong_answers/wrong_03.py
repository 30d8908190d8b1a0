"""Mistakes that the checks of notebook 03 must catch."""

import torch

from lcqat_min.codebook.digits import digits_of


def lo_is_a_half(q):
    return torch.sign(q), q - torch.sign(q)


def high_and_low_swapped(q):
    hi = torch.sign(q)
    return 2 * (q - hi), hi


def lo_by_size(q):
    """Right for positive digits only: the larger one is not always the one with lo = +1."""
    return torch.sign(q), torch.where(q.abs() > 1, 1.0, -1.0)


def only_one_tensor(q):
    return torch.sign(q)


def _tables(A):
    digits = digits_of(torch.arange(16), 4, 2)
    return digits @ A[:, :4].T, digits @ A[:, 4:].T


def offset_in_both_tables(index, A, b):
    high, low = _tables(A)
    return (high + b)[index >> 4] + (low + b)[index & 15]


def offset_forgotten(index, A, b):
    high, low = _tables(A)
    return high[index >> 4] + low[index & 15]


def halves_swapped(index, A, b):
    high, low = _tables(A)
    return high[index & 15] + low[index >> 4] + b


def shift_by_two(index, A, b):
    high, low = _tables(A)
    return high[(index >> 2) & 15] + low[index & 15] + b


def _search(x, upper, half_norm, partner):
    inner = x @ upper.T
    pair = (inner.abs() - half_norm).argmax(1)
    sign = inner.gather(1, pair[:, None]).squeeze(1)
    return torch.where(sign >= 0, 128 + pair, partner(pair))


def length_forgotten(x, upper):
    return _search(x, upper, 0.0, lambda pair: 127 - pair)


def whole_square_subtracted(x, upper):
    return _search(x, upper, upper.square().sum(1), lambda pair: 127 - pair)


def upper_half_only(x, upper):
    return 128 + (x @ upper.T - upper.square().sum(1) / 2).argmax(1)


def partner_is_the_same_place_in_the_lower_half(x, upper):
    return _search(x, upper, upper.square().sum(1) / 2, lambda pair: pair)


WRONG = {
    "split_digit": [lo_is_a_half, high_and_low_swapped, lo_by_size, only_one_tensor],
    "decode_by_halves": [offset_in_both_tables, offset_forgotten, halves_swapped, shift_by_two],
    "encode_symmetric": [
        length_forgotten,
        whole_square_subtracted,
        upper_half_only,
        partner_is_the_same_place_in_the_lower_half,
    ],
}
