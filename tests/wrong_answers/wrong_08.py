"""Mistakes that the checks of notebook 08 must catch."""

import math

from lcqat_min.train import TrainConfig


def the_other_way_round(student, teacher):
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_s.exp() * (log_s - log_t)).sum(-1).mean()


def averages_the_vocabulary(student, teacher):
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).mean()


def sums_the_tokens(student, teacher):
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum()


def overflows(student, teacher):
    p_s = student.exp() / student.exp().sum(-1, keepdim=True)
    p_t = teacher.exp() / teacher.exp().sum(-1, keepdim=True)
    return (p_t * (p_t.log() - p_s.log())).sum(-1).mean()


def ignores_the_schedule(distance, rate):
    return max(1, math.ceil(distance / rate))


def stops_inside_a_long_run(distance, rate):
    config, travelled = TrainConfig(steps=10_000), 0.0
    for step in range(10_000):
        travelled += rate * config.rate(step)
        if travelled >= distance:
            return step + 1


def doubles_the_run(distance, rate):
    steps = 1
    while rate * sum(TrainConfig(steps=steps).rate(step) for step in range(steps)) < distance:
        steps *= 2
    return steps


def compares_means(first, second):
    a, b = sum(first) / len(first), sum(second) / len(second)
    return "first" if a < b else "second" if b < a else "no claim"


def trusts_one_seed(first, second):
    return "first" if max(first) < min(second) else "second" if max(second) < min(first) else "no claim"


def claims_when_touching(first, second):
    if min(len(first), len(second)) < 2:
        return "no claim"
    return "first" if max(first) <= min(second) else "second" if max(second) <= min(first) else "no claim"


def larger_is_better(first, second):
    if min(len(first), len(second)) < 2:
        return "no claim"
    return "first" if min(first) > max(second) else "second" if min(second) > max(first) else "no claim"


WRONG = {
    "distance_to_teacher": [the_other_way_round, averages_the_vocabulary, sums_the_tokens, overflows],
    "steps_to_flip": [ignores_the_schedule, stops_inside_a_long_run, doubles_the_run],
    "which_is_better": [compares_means, trusts_one_seed, claims_when_touching, larger_is_better],
}
