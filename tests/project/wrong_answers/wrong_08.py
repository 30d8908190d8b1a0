"""Mistakes that the checks of notebook 08 must catch."""

import math

from lcqat_min.qat.config import TrainConfig


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


def _judge(first, second, least, width, sign=1):
    if min(len(first), len(second)) < least:
        return "no claim"
    first, second = [sign * x for x in first], [sign * x for x in second]
    need = width(max(first) - min(first), max(second) - min(second))
    if min(second) - max(first) > need:
        return "first"
    return "second" if min(first) - max(second) > need else "no claim"


def trusts_two_seeds(first, second):
    return _judge(first, second, 2, max)


def ranges_apart_are_enough(first, second):
    return _judge(first, second, 3, lambda a, b: 0.0)


def takes_the_narrower_range(first, second):
    return _judge(first, second, 3, min)


def larger_is_better(first, second):
    return _judge(first, second, 3, max, sign=-1)


WRONG = {
    "distance_to_teacher": [the_other_way_round, averages_the_vocabulary, sums_the_tokens, overflows],
    "steps_to_flip": [ignores_the_schedule, stops_inside_a_long_run, doubles_the_run],
    "which_is_better": [
        compares_means,
        trusts_two_seeds,
        ranges_apart_are_enough,
        takes_the_narrower_range,
        larger_is_better,
    ],
}
