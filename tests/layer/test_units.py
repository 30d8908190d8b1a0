"""Root mean squares from the smallest to the largest numbers that fp32 holds, against double precision."""

import pytest
import torch

from lcqat_min.layer.units import in_units, root_mean_square


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-3, 1.0, 1e30, 1e38])
def test_squares_of_any_size_fit(generator, size):
    x = torch.randn(7, 5, generator=generator).clamp(-3, 3) * size
    assert root_mean_square(x) == pytest.approx(x.double().square().mean().sqrt().item(), rel=1e-5)
    scaled, unit = in_units(x)
    assert torch.equal(scaled * unit, x) and scaled.abs().max() < 4


def test_zeros_have_size_zero():
    x = torch.nn.Parameter(torch.zeros(3))
    assert root_mean_square(x) == 0 and in_units(x)[1] == 1
