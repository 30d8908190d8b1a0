"""Mistakes that the checks of notebook 04 must catch."""

import torch

from lcqat_min.layer.rotation import mix


def not_orthonormal(i, j, size):
    return (-1) ** (i & j).bit_count()


def exclusive_or(i, j, size):
    return (-1) ** (i ^ j).bit_count() / size**0.5


def divided_by_the_size(i, j, size):
    return (-1) ** (i & j).bit_count() / size


def shared_or_not(i, j, size):
    """Right up to size 2: counts "any shared one" instead of an odd number."""
    return (-1 if i & j else 1) / size**0.5


def signs_before_mixing(W_r, s_out, s_in):
    return mix((mix(W_r * s_in) * s_out[:, None]).T).T


def inputs_only(W_r, s_out, s_in):
    return mix(W_r) * s_in


def no_signs_on_the_outputs(W_r, s_out, s_in):
    return mix((mix(W_r) * s_in).T).T


def not_transposed_back(W_r, s_out, s_in):
    return mix((mix(W_r) * s_in).T) * s_out


def _butterfly(x, scale, minus=-1.0, start=1):
    size, h, y = x.shape[-1], start, x
    while h < size:
        pairs = y.reshape(*x.shape[:-1], -1, 2, h)
        u, v = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([u + v, minus * (v - u) if minus > 0 else u - v], dim=-2).reshape(x.shape)
        h *= 2
    return y * scale


def scale_forgotten(x):
    return _butterfly(x, 1.0)


def divided_by_b(x):
    return _butterfly(x, 1 / x.shape[-1])


def difference_the_other_way(x):
    return _butterfly(x, x.shape[-1] ** -0.5, minus=1.0)


def one_round_missing(x):
    return _butterfly(x, x.shape[-1] ** -0.5, start=2)


WRONG = {
    "hadamard_entry": [not_orthonormal, exclusive_or, divided_by_the_size, shared_or_not],
    "turn_back": [signs_before_mixing, inputs_only, no_signs_on_the_outputs, not_transposed_back],
    "fast_mix": [scale_forgotten, divided_by_b, difference_the_other_way, one_round_missing],
}
