"""Planted mistakes for the exercises of notebook 02."""

import torch


def forgets_the_length(x, table):
    return (x @ table.T).argmax(1)


def takes_off_the_whole_length(x, table):
    return (x @ table.T - table.square().sum(1)).argmax(1)


def takes_the_smallest(x, table):
    return (x @ table.T - table.square().sum(1) / 2).argmin(1)


def best_vector_of_each_codeword(x, table):
    return (x @ table.T - table.square().sum(1) / 2).argmax(0)


def sums_instead_of_means(x, index, table):
    total = torch.zeros_like(table).index_add_(0, index, x)
    used = torch.bincount(index, minlength=len(table))[:, None] > 0
    return torch.where(used, total, table)


def empty_cells_become_nan(x, index, table):
    count = torch.bincount(index, minlength=len(table))[:, None]
    return torch.zeros_like(table).index_add_(0, index, x) / count


def empty_cells_become_zero(x, index, table):
    count = torch.bincount(index, minlength=len(table))[:, None].clamp(min=1)
    return torch.zeros_like(table).index_add_(0, index, x) / count


def counts_the_old_codeword(x, index, table):
    count = torch.bincount(index, minlength=len(table))[:, None]
    return table.clone().index_add_(0, index, x) / (count + 1) * (count > 0) + table * (count == 0)


def forgets_the_width(weights, budget):
    d = 0
    while 16 * 4 ** (d + 1) / weights <= budget:
        d += 1
    return d


def forgets_sixteen_bits(weights, budget):
    d = 0
    while (d + 1) * 4 ** (d + 1) / weights <= budget:
        d += 1
    return d


def one_too_many(weights, budget):
    d = 1
    while 16 * d * 4**d / weights <= budget:
        d += 1
    return d


def never_says_zero(weights, budget):
    d = 1
    while 16 * (d + 1) * 4 ** (d + 1) / weights <= budget:
        d += 1
    return d


WRONG = {
    "nearest_by_products": [
        forgets_the_length,
        takes_off_the_whole_length,
        takes_the_smallest,
        best_vector_of_each_codeword,
    ],
    "cell_means": [sums_instead_of_means, empty_cells_become_nan, empty_cells_become_zero, counts_the_old_codeword],
    "largest_dimension": [forgets_the_width, forgets_sixteen_bits, one_too_many, never_says_zero],
}
