"""Planted mistakes for the checks of notebook 06."""

import torch

from lcqat_min.layer.surrogate import slope


def nothing_detached(u, top):
    return u + (u.round().clamp(0, top) - u)


def all_detached(u, top):
    return (u + (u.round().clamp(0, top) - u)).detach()


def clipped_outside(u, top):
    return (u + (u.round() - u).detach()).clamp(0, top)


def not_clipped(u, top):
    return u + (u.round() - u).detach()


def transposed(A, q, g):
    return q.T @ g, g.sum(0), g @ A


def means_instead_of_sums(A, q, g):
    return g.T @ q / len(q), g.mean(0), g @ A


def gradient_of_q_summed(A, q, g):
    return g.T @ q, g.sum(0), (g @ A).sum(0)


def walker(sign=-1, use_slope=True, first=1):
    def answer(u, gradient, rate, estimator):
        start = min(max(round(u), 0), 3)
        for step in range(first, 1000 + first):
            u += sign * rate * gradient * (slope(torch.tensor(u), 3, estimator).item() if use_slope else 1)
            if min(max(round(u), 0), 3) != start:
                return step
        return None

    return answer


def backward(module, x):
    module(x).square().sum().backward()


def only_none(module, x):
    module.zero_grad()
    backward(module, x)
    return {name for name, p in module.named_parameters() if p.requires_grad and p.grad is None}


def frozen_ones_too(module, x):
    module.zero_grad()
    backward(module, x)
    return {name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()}


def fooled_by_old_gradients(module, x):
    backward(module, x)
    return {name for name, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}


WRONG = {
    "ste_by_detach": [nothing_detached, all_detached, clipped_outside, not_clipped],
    "vector_gradients": [transposed, means_instead_of_sums, gradient_of_q_summed],
    "walk_to_flip": [walker(sign=1), walker(use_slope=False), walker(first=0)],
    "stuck_parameters": [only_none, frozen_ones_too, fooled_by_old_gradients],
}
