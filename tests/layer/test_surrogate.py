"""Rounding: forward values by hand, slopes against a table and against the derivative of the smooth stair.

Checked: levels and ties, extreme and infinite latents, signs; the three surrogates at documented places,
their mean over a cell and their symmetry at both outer edges; that backward is grad * slope and nothing else;
the equivalence of `sign_of` and one cell of `round_to_levels`; error messages.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcqat_min.layer.surrogate import DGE_CEILING, DGE_POWER, ESTIMATORS, round_to_levels, sign_of, slope

latents = st.floats(-6, 9, width=32)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_levels_of_known_latents(estimator):
    u = torch.tensor([-math.inf, -1e30, -0.6, 0.49, 0.51, 1.2, 2.51, 3.4, 3.6, 1e30, math.inf])
    expected = torch.tensor([0.0, 0, 0, 0, 1, 1, 3, 3, 3, 3, 3])
    assert torch.equal(round_to_levels(u, 3, estimator), expected)
    assert torch.equal(round_to_levels(u, 1, estimator), expected.clamp(max=1))


def test_halves_go_to_the_even_level():
    u = torch.tensor([-0.5, 0.5, 1.5, 2.5, 3.5])
    assert round_to_levels(u).tolist() == [0, 0, 2, 2, 3]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_signs_of_known_latents(estimator):
    v = torch.tensor([-math.inf, -2.0, -1e-30, -0.0, 0.0, 1e-30, 5.0, math.inf])
    assert sign_of(v, estimator).tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]


@given(st.lists(latents, min_size=1, max_size=8), st.integers(1, 7))
def test_forward_is_the_nearest_level_whatever_the_estimator(values, top):
    u = torch.tensor(values)
    by_hand = torch.tensor([float(min(max(round(value), 0), top)) for value in values])
    for estimator in ESTIMATORS:
        assert torch.equal(round_to_levels(u, top, estimator), by_hand)


@pytest.mark.parametrize(
    ("r", "expected"),
    [(0.0, 0.2), (1.0, 0.2), (0.3, 0.4163), (0.45, 1.2619), (0.49, 3.0), (0.5, 3.0)],  # 4.57 unclamped
)
@pytest.mark.parametrize("cell", [0, 1, 2])
def test_dge_at_documented_places(r, expected, cell):
    u = torch.tensor([cell + r, cell + 1 - r], dtype=torch.float64)
    torch.testing.assert_close(slope(u, 3, "dge"), torch.full_like(u, expected), rtol=0, atol=1e-4)


def test_dge_is_the_slope_of_the_smooth_stair():
    def stair(u: torch.Tensor) -> torch.Tensor:
        cell = u.floor()
        t = 2 * (u - cell) - 1
        return cell + (1 + t.sign() * t.abs() ** (1 / DGE_POWER)) / 2

    u = torch.linspace(0.01, 2.99, 400, dtype=torch.float64)
    numeric = (stair(u + 1e-7) - stair(u - 1e-7)) / 2e-7
    smooth = (u - u.round()).abs() < 0.45  # neither at a boundary, where the ceiling acts ...
    smooth &= (u - u.round()).abs() > 1e-3  # ... nor at a level, where the stair has a kink
    assert smooth.sum() > 300
    torch.testing.assert_close(slope(u, 3, "dge")[smooth], numeric[smooth], rtol=1e-4, atol=1e-4)


def test_the_mean_of_dge_over_a_cell():
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    edge = (DGE_CEILING * DGE_POWER) ** (1 / (1 / DGE_POWER - 1))  # |2r - 1| below which the ceiling holds
    exact = DGE_CEILING * edge + 1 - edge ** (1 / DGE_POWER)
    assert exact == pytest.approx(0.593, abs=5e-4)
    for cell in (0, 1, 2):
        assert slope(cell + u, 3, "dge").mean().item() == pytest.approx(exact, abs=1e-5)


@given(st.floats(0, 20), st.sampled_from(ESTIMATORS), st.sampled_from([1, 3, 7]))
def test_both_outer_edges_look_alike(t, estimator, top):
    u = torch.tensor([-0.5 - t, top + 0.5 + t], dtype=torch.float64)
    below, above = slope(u, top, estimator).tolist()
    assert below == pytest.approx(above, abs=1e-12)


def test_dge_sees_no_boundary_above_the_top_level():
    # At top + 1/2 the cell would end in a boundary if there were a level above: 3.0 instead of 2^-0.8 / 5.
    u = torch.linspace(3, 9, 601, dtype=torch.float64)
    outside = slope(u, 3, "dge")
    assert slope(torch.tensor([-0.5, 3.5]), 3, "dge").tolist() == pytest.approx([2**-0.8 / 5] * 2)
    assert outside[0] == pytest.approx(0.2) and (outside.diff() < 0).all()


def test_clipped_stops_where_the_grid_ends():
    u = torch.tensor([-1e9, -0.51, -0.5, 0.0, 1.7, 3.5, 3.51, math.inf])
    assert slope(u, 3, "clipped").tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert slope(u, 3, "ste").tolist() == [1] * 8


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_slopes_of_extreme_latents_are_finite(estimator):
    u = torch.tensor([-1e30, -1e9, 1e9, 1e30, 0.5, 1.5, 2.5])
    gain = slope(u, 3, estimator)
    assert torch.isfinite(gain).all() and (gain >= 0).all() and (gain <= DGE_CEILING).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_backward_is_the_gradient_times_the_slope(estimator, generator):
    u = (6 * torch.rand(4, 5, generator=generator) - 1.5).requires_grad_()
    v = torch.randn(4, 5, generator=generator, requires_grad=True)
    grad = torch.randn(4, 5, generator=generator)
    (round_to_levels(u, 3, estimator) * grad).sum().backward()
    (sign_of(v, estimator) * grad).sum().backward()
    assert torch.equal(u.grad, grad * slope(u.detach(), 3, estimator))
    assert torch.equal(v.grad, grad * slope((v.detach() + 1) / 2, 1, estimator))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_sign_is_one_cell_of_rounding(estimator, generator):
    v = 3 * torch.randn(200, generator=generator)
    one, other = v.clone().requires_grad_(), v.clone().requires_grad_()
    sign, cell = sign_of(one, estimator), 2 * round_to_levels((other + 1) / 2, 1, estimator) - 1
    assert torch.equal(sign, cell)
    sign.sum().backward()
    cell.sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_the_latent_is_left_as_it_was(generator):
    u = torch.randn(10, generator=generator, requires_grad=True)
    before = u.detach().clone()
    round_to_levels(u, 3, "dge").sum().backward()
    sign_of(u, "dge").sum().backward()
    assert torch.equal(u.detach(), before)


@pytest.mark.parametrize("function", [round_to_levels, sign_of])
def test_an_unknown_estimator_is_named_with_the_known_ones(function):
    with pytest.raises(ValueError, match="'sigmoid'; choose one of ste, clipped, dge"):
        function(torch.zeros(2), estimator="sigmoid")
