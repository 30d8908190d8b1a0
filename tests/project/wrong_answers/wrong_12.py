"""Mistakes that the checks of notebook 12 must catch."""

import math

from lcqat_min.layer.rotation import mix


def in_seconds(parameters, tokens, speed, teacher):
    return (8 if teacher else 6) * parameters * tokens / speed


def forward_only(parameters, tokens, speed, teacher):
    return (4 if teacher else 2) * parameters * tokens / speed / 3600


def a_teacher_that_learns(parameters, tokens, speed, teacher):
    return (12 if teacher else 6) * parameters * tokens / speed / 3600


def forgets_the_teacher(parameters, tokens, speed, teacher):
    return 6 * parameters * tokens / speed / 3600


def no_signs(decoded, row_scale, signs_out, signs_in, col_scale):
    return mix(mix((decoded * row_scale[:, None]).T).T) * col_scale


def no_signs_of_the_outputs(decoded, row_scale, signs_out, signs_in, col_scale):
    return mix(mix((decoded * row_scale[:, None]).T).T) * (signs_in * col_scale)


def row_scale_outside(decoded, row_scale, signs_out, signs_in, col_scale):
    return mix((mix(decoded.T) * signs_out).T * row_scale[:, None]) * (signs_in * col_scale)


def signs_before_mixing(decoded, row_scale, signs_out, signs_in, col_scale):
    W = mix((decoded * row_scale[:, None]).T * signs_out).T
    return mix(W * signs_in) * col_scale


def output_signs_before_mixing(decoded, row_scale, signs_out, signs_in, col_scale):
    W = mix((decoded * row_scale[:, None]).T * signs_out).T
    return mix(W) * signs_in * col_scale


def input_signs_before_mixing(decoded, row_scale, signs_out, signs_in, col_scale):
    W = (mix((decoded * row_scale[:, None]).T) * signs_out).T
    return mix(W * signs_in) * col_scale


def left_transposed(decoded, row_scale, signs_out, signs_in, col_scale):
    return mix((decoded * row_scale[:, None]).T) * signs_out


def no_column_scale(decoded, row_scale, signs_out, signs_in, col_scale):
    return mix((mix((decoded * row_scale[:, None]).T) * signs_out).T) * signs_in


def lets_nan_through(losses, kl_after_ptq):
    first = losses[0]
    if losses[-1] > 1.5 * first:
        return "diverging"
    if first < 0.1 * kl_after_ptq:
        return "leaking"
    return "stuck" if all(abs(loss - first) <= 0.01 * first for loss in losses) else "learning"


def looks_at_the_last_loss_only(losses, kl_after_ptq):
    first, last = losses[0], losses[-1]
    if not all(map(math.isfinite, losses)) or last > 1.5 * first:
        return "diverging"
    if first < 0.1 * kl_after_ptq:
        return "leaking"
    return "stuck" if abs(last - first) <= 0.01 * first else "learning"


def leaks_before_it_diverges(losses, kl_after_ptq):
    first = losses[0]
    if first < 0.1 * kl_after_ptq:
        return "leaking"
    if not all(map(math.isfinite, losses)) or losses[-1] > 1.5 * first:
        return "diverging"
    return "stuck" if all(abs(loss - first) <= 0.01 * first for loss in losses) else "learning"


def any_rise_is_divergence(losses, kl_after_ptq):
    first = losses[0]
    if not all(map(math.isfinite, losses)) or max(losses) > 1.2 * first:
        return "diverging"
    if first < 0.1 * kl_after_ptq:
        return "leaking"
    return "stuck" if all(abs(loss - first) <= 0.01 * first for loss in losses) else "learning"


def says_nothing_when_all_is_well(losses, kl_after_ptq):
    if not all(map(math.isfinite, losses)) or losses[-1] > 1.5 * losses[0]:
        return "diverging"


WRONG = {
    "gpu_hours": [in_seconds, forward_only, a_teacher_that_learns, forgets_the_teacher],
    "dense_weight": [
        no_signs,
        no_signs_of_the_outputs,
        row_scale_outside,
        signs_before_mixing,
        output_signs_before_mixing,
        input_signs_before_mixing,
        left_transposed,
        no_column_scale,
    ],
    "diagnose": [
        lets_nan_through,
        looks_at_the_last_loss_only,
        leaks_before_it_diverges,
        any_rise_is_divergence,
        says_nothing_when_all_is_well,
    ],
}
