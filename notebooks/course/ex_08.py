"""Checks of notebook 08: the distillation loss, the steps until a code may flip, claims from seeds."""

import math

import torch

from lcqat_min.qat.config import TrainConfig

from .exercise import Wrong, exercise, expect_close


@exercise
def distance_to_teacher(answer):
    """By pencil, against loops, and with large logits."""
    student = torch.tensor([[0.25, 0.5, 0.25]]).log()
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    expect_close(answer(student, teacher), math.log(2) / 4, "KL for (1/4, 1/2, 1/4) and (1/2, 1/4, 1/4)")
    generator = torch.Generator().manual_seed(8)
    student, teacher = torch.randn(2, 4, 5, generator=generator)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        sum_s, sum_t = sum(map(math.exp, s)), sum(map(math.exp, t))
        p_s, p_t = [math.exp(a) / sum_s for a in s], [math.exp(a) / sum_t for a in t]
        total += sum(t * math.log(t / s) for s, t in zip(p_s, p_t, strict=True))
    expect_close(answer(student, teacher), total / 4, "the mean over 4 tokens (KL of teacher to student)")
    expect_close(answer(student + 200, teacher + 200), total / 4, "KL with 200 added to all logits", 1e-3)
    # softmax underflows here: its log would be minus infinity; KL is 1/2 (-log 2 + 200) + 1/2 (-log 2)
    far, even = torch.tensor([[0.0, 200.0]]), torch.zeros(1, 2)
    expect_close(answer(far, even), 100 - math.log(2), "KL where a student's probability is exp(-200)", 1e-3)
    expect_close(answer(even, far), math.log(2), "KL where a teacher's probability is exp(-200)", 1e-3)


@exercise
def steps_to_flip(answer):
    """Against every shorter run, and by hand: one step has the full rate."""
    for distance, rate in ((0.003, 0.003), (0.0031, 0.003), (0.025, 0.003), (0.025, 0.0003)):
        got = answer(distance, rate)
        if not isinstance(got, int):
            raise Wrong(f"The answer is {got!r}; a whole number of steps is wanted.")
        if got < 1:
            raise Wrong(f"For {distance} bins at {rate} you say {got} steps; a run has at least one.")
        if (far := _reach(got, rate)) < distance:
            raise Wrong(
                f"For {distance} bins at {rate} a step you say {got} steps, but such a run travels {far:.4f} bins. "
                "Warm-up and decay have smaller rates: sum config.rate(step) over the steps."
            )
        shorter = next(steps for steps in range(1, got + 1) if _reach(steps, rate) >= distance)
        if shorter < got:
            raise Wrong(f"For {distance} bins at {rate} a step {got} steps are enough, but so are {shorter}.")


@exercise
def which_is_better(answer):
    """Far apart either way, apart by less than a width, overlapping, one inside the other, too few seeds."""
    cases = (
        ([0.12, 0.13, 0.12], [0.15, 0.17, 0.16], "no claim"),
        ([0.12, 0.13, 0.12], [0.18, 0.17, 0.17], "first"),
        ([0.5, 0.4, 0.6], [0.1, 0.15, 0.12], "second"),
        ([0.5, 0.4, 0.6], [0.1, 0.3, 0.2], "no claim"),
        ([0.10, 0.16, 0.12], [0.15, 0.30, 0.20], "no claim"),
        ([0.15, 0.30, 0.20], [0.10, 0.16, 0.12], "no claim"),
        ([0.10, 0.40, 0.20], [0.20, 0.30, 0.25], "no claim"),
        ([0.10, 0.11], [0.20, 0.21, 0.22], "no claim"),
    )
    for first, second, wanted in cases:
        got = answer(list(first), list(second))
        if got != wanted:
            raise Wrong(f"For {first} and {second} you say {got!r}; {wanted!r} is right.")


def _reach(steps: int, rate: float) -> float:
    config = TrainConfig(steps=steps)
    return rate * sum(config.rate(step) for step in range(steps))
