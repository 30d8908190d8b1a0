"""Settings of a training run: the phases of its schedule, and values that are refused by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcqat_min.qat.config import TrainConfig


@given(steps=st.integers(1, 3000), warmup=st.floats(0, 1), decay=st.floats(0, 1))
def test_phases_sum_to_the_steps_and_the_rate_ends_near_zero(steps, warmup, decay):
    share = max(1.0, warmup + decay)
    config = TrainConfig(steps, warmup=warmup / share, decay=min(decay / share, 1 - warmup / share))
    up, stable, down = config.phases()
    assert up + stable + down == steps
    assert min(up, stable, down) >= 0
    rates = [config.rate(step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:up] == sorted(rates[:up])
    assert rates[up:] == sorted(rates[up:], reverse=True)
    assert rates[up : up + stable] == [1.0] * stable
    assert down == 0 or rates[-1] == pytest.approx(1 / (down + 1))


def test_two_phases_that_both_round_up():
    assert TrainConfig(3, warmup=0.5, decay=0.5).phases() == (2, 0, 1)


def test_the_first_rate_of_a_warm_up():
    config = TrainConfig(100, warmup=0.2)
    assert [config.rate(0), config.rate(19), config.rate(20)] == pytest.approx([1 / 21, 20 / 21, 1])


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"steps": 0}, "steps is 0.*at least 1"),
        ({"steps": 1, "log_every": 0}, "log_every is 0"),
        ({"steps": 1, "checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"steps": 9, "warmup": 0.6, "decay": 0.5}, "warmup is 0.6 and decay 0.5"),
        ({"steps": 9, "warmup": -0.1}, "warmup is -0.1"),
        ({"steps": 9, "clip": 0.0}, "clip is 0.0.*above 0"),
    ],
)
def test_wrong_settings(wrong, match):
    with pytest.raises(ValueError, match=match):
        TrainConfig(**wrong)


@pytest.mark.parametrize("rate", ["lr_latents", "lr_scales", "lr_codebooks", "lr_rest"])
@pytest.mark.parametrize("value", [-1e-4, float("nan")])
def test_rates_below_nothing_are_refused(rate, value):
    with pytest.raises(ValueError, match="learning rates .* must be at least 0"):
        TrainConfig(1, **{rate: value})
