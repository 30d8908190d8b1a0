"""Mistakes that students make in notebook 10."""

import torch

from lcqat_min.codebook.digits import digits_of


def overhead_forgotten(rows, columns, bandwidth, overhead):
    return (rows * columns * 2 / bandwidth) / (rows * columns * 0.25 / bandwidth)


def overhead_of_the_kernel_alone(rows, columns, bandwidth, overhead):
    return (rows * columns * 2 / bandwidth) / (overhead + rows * columns * 0.25 / bandwidth)


def upside_down(rows, columns, bandwidth, overhead):
    return (overhead + rows * columns * 0.25 / bandwidth) / (overhead + rows * columns * 2 / bandwidth)


def bits_for_bytes(rows, columns, bandwidth, overhead):
    return (overhead + rows * columns * 16 / bandwidth) / (overhead + rows * columns * 2 / bandwidth)


def without_b(q, A, b, x):
    return (x.unflatten(1, (q.shape[1], -1)) @ A).flatten(1) @ q.flatten(1).T


def b_twice(q, A, b, x):
    return without_b(q, A, b, x) + 2 * (x.unflatten(1, (q.shape[1], -1)).sum(1) @ b)[:, None]


def transposed_where_square(q, A, b, x):
    A = A.T if A.shape[0] == A.shape[1] else A
    return without_b(q, A, b, x) + (x.unflatten(1, (q.shape[1], -1)).sum(1) @ b)[:, None]


def rows_by_tokens(q, A, b, x):
    return transposed_where_square(q, A, b, x).T


def b_in_every_table(A, b):
    return torch.stack([digits_of(torch.arange(16), 4, 2) @ part.T + b for part in A.split(4, dim=1)])


def no_b(A, b):
    return b_in_every_table(A, b) - b


def lowest_first(A, b):
    tables = no_b(A, b).flip(0)
    tables[0] += b
    return tables


def one_table(A, b):
    return (digits_of(torch.arange(256), 8, 2) @ A[:, :8].T + b)[None]


WRONG = {
    "predicted_gain": [overhead_forgotten, overhead_of_the_kernel_alone, upside_down, bits_for_bytes],
    "folded_product": [without_b, b_twice, transposed_where_square, rows_by_tokens],
    "nibble_tables": [b_in_every_table, no_b, lowest_first, one_table],
}
