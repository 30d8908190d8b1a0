"""Planted mistakes for the exercises of notebook 01."""

import torch


def forgets_negative_weights(row, bits):
    return row.max().item() / ((2**bits - 1) / 2)


def always_two_bits(row, bits):
    return row.abs().max().item() / 1.5


def counts_levels_not_steps(row, bits):
    return row.abs().max().item() / 2 ** (bits - 1)


def codes_alone(inputs, bits, group):
    return bits


def one_scale_a_row(inputs, bits, group):
    return bits + 16 / inputs


def drops_the_short_group(inputs, bits, group):
    return bits + 16 * (inputs // group) / inputs


def splits_the_short_group(inputs, bits, group):
    return bits + 16 / group


def ignores_correlation(e, step, H):
    move = torch.where(e > 0, -step, step)
    change = 2 * move * e * H.diagonal() + move.square() * H.diagonal()
    j = change.argmin().item()
    return j if change[j] < 0 else -1


def always_moves(e, step, H):
    move = torch.where(e > 0, -step, step)
    return (2 * move * (e @ H) + move.square() * H.diagonal()).argmin().item()


def forgets_the_square(e, step, H):
    move = torch.where(e > 0, -step, step)
    change = 2 * move * (e @ H)
    j = change.argmin().item()
    return j if change[j] < 0 else -1


def moves_the_wrong_way(e, step, H):
    move = torch.where(e > 0, step, -step)
    change = 2 * move * (e @ H) + move.square() * H.diagonal()
    j = change.argmin().item()
    return j if change[j] < 0 else -1


WRONG = {
    "unclipped_step": [forgets_negative_weights, always_two_bits, counts_levels_not_steps],
    "grouped_bits": [codes_alone, one_scale_a_row, drops_the_short_group, splits_the_short_group],
    "best_flip": [ignores_correlation, always_moves, forgets_the_square, moves_the_wrong_way],
}
