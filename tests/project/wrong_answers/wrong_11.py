"""Mistakes that the checks of notebook 11 must catch."""

import math

from torch import nn


def in_bytes(linear, other, latents):
    return (16 * latents + 2.25) * linear + 18 * other


def counts_what_backward_keeps(linear, other, latents):
    return ((16 * latents + 2.25 + 20) * linear + 18 * other) / 1e9


def a_teacher_for_each_latent(linear, other, latents):
    return (18.25 * latents * linear + 18 * other) / 1e9


def forgets_the_two_averages(linear, other, latents):
    return ((8 * latents + 2.25) * linear + 10 * other) / 1e9


def forgets_the_teacher_of_the_rest(linear, other, latents):
    return ((16 * latents + 2.25) * linear + 16 * other) / 1e9


def takes_the_tied_head(model, skip):
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if not any(part in name for part in skip)]


def skips_whole_names_only(model, skip):
    places = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name, module in linear if name not in skip and places.count(id(module.weight)) == 1]


def skips_by_the_word_head(model, skip):
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if not any(part in name for part in (*skip, "head"))]


def counts_a_shared_parameter_once(model, skip):
    places = [id(p) for _, p in model.named_parameters()]
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [
        name
        for name, module in linear
        if places.count(id(module.weight)) == 1 and not any(part in name for part in skip)
    ]


def one_process(tokens, window, batch, processes):
    return math.ceil(tokens / (window * batch))


def rounds_down(tokens, window, batch, processes):
    return tokens // (window * batch * processes)


def a_fraction_of_a_step(tokens, window, batch, processes):
    return tokens / (window * batch * processes)


def one_step_too_many(tokens, window, batch, processes):
    return tokens // (window * batch * processes) + 1


WRONG = {
    "lean_gigabytes": [
        in_bytes,
        counts_what_backward_keeps,
        a_teacher_for_each_latent,
        forgets_the_two_averages,
        forgets_the_teacher_of_the_rest,
    ],
    "taken_layers": [
        takes_the_tied_head,
        skips_whole_names_only,
        skips_by_the_word_head,
        counts_a_shared_parameter_once,
    ],
    "steps_needed": [one_process, rounds_down, a_fraction_of_a_step, one_step_too_many],
}
