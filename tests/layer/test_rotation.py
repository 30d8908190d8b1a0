"""Block-Hadamard rotation against a dense matrix whose entries come from a formula, not from the recursion.

Checked: entries, orthonormality and symmetry of H; `mix`, `rotate` and `unrotate` against dense
block-diagonal matrices in float64; the way back for any width; a layer that computes the same after both
sides were rotated; signs; the spread of an outlier; gradients after an evaluation; error messages.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcqat_min.layer.rotation import KEPT, MAX_BLOCK, block_of, hadamard, mix, random_signs, rotate, unrotate

WIDTHS = (1, 2, 7, 33, 48, 96, 128, 384, 768)


def dense_hadamard(size: int) -> torch.Tensor:
    """float64 [size, size]: entry (i, j) is -1 to the number of ones that i and j share in binary."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


def dense_mix(width: int) -> torch.Tensor:
    """float64 [width, width]: the block-diagonal matrix of `mix`."""
    block = next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if width % size == 0)
    return torch.block_diag(*[dense_hadamard(block)] * (width // block))


@pytest.mark.parametrize("size", [1, 2, 4, 16, 128])
def test_hadamard_is_the_orthonormal_symmetric_sylvester_matrix(size):
    H = hadamard(size, torch.float64)
    torch.testing.assert_close(H, dense_hadamard(size), rtol=0, atol=1e-15)
    torch.testing.assert_close(H @ H, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(H, H.T)


def test_hadamard_has_the_dtype_asked_for():
    assert hadamard(8).dtype == torch.float32
    assert hadamard(8, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("size", [-2, 0, 3, 12, 96])
def test_hadamard_refuses_other_sizes(size):
    with pytest.raises(ValueError, match=rf"2\^p rows; got {size}\. Use block_of"):
        hadamard(size)


@pytest.mark.parametrize(
    ("width", "block"), [(1, 1), (2, 2), (7, 1), (48, 16), (96, 32), (128, 128), (384, 128), (1024, 128)]
)
def test_block_of_known_widths(width, block):
    assert block_of(width) == block


@given(st.integers(1, 10_000))
def test_block_is_the_largest_power_of_two_that_divides(width):
    block = block_of(width)
    assert block in {2**p for p in range(8)} and width % block == 0
    assert block == MAX_BLOCK or width % (2 * block) != 0


@pytest.mark.parametrize("width", [0, -4])
def test_block_of_refuses_an_empty_width(width):
    with pytest.raises(ValueError, match=f"at least 1; got {width}"):
        block_of(width)


@pytest.mark.parametrize("width", WIDTHS)
def test_rotation_equals_the_dense_matrices(width, generator):
    x = torch.randn(3, 5, width, generator=generator, dtype=torch.float64)
    signs = random_signs(width, generator).double()
    H = dense_mix(width)
    torch.testing.assert_close(mix(x), x @ H, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate(x, signs), (x * signs) @ H, rtol=0, atol=1e-12)
    torch.testing.assert_close(unrotate(x, signs), (x @ H) * signs, rtol=0, atol=1e-12)


@given(st.one_of(st.sampled_from(WIDTHS), st.integers(1, 300)), st.integers(0, 2**31))
def test_unrotate_undoes_rotate_and_lengths_stay(width, seed):
    generator = torch.Generator().manual_seed(seed)
    x, signs = torch.randn(4, width, generator=generator), random_signs(width, generator)
    turned = rotate(x, signs)
    torch.testing.assert_close(unrotate(turned, signs), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate(unrotate(x, signs), signs), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(48, 33), (128, 96), (7, 384)])
def test_a_layer_computes_the_same_in_the_rotated_basis(rows, columns, generator):
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    s_in, s_out = (random_signs(width, generator).double() for width in (columns, rows))
    rotated = rotate(rotate(W, s_in).T, s_out).T
    dense = dense_mix(rows) @ (s_out[:, None] * W * s_in) @ dense_mix(columns)
    torch.testing.assert_close(rotated, dense, rtol=0, atol=1e-12)

    x = torch.randn(5, columns, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(unrotate(rotate(x, s_in) @ rotated.T, s_out), x @ W.T, rtol=0, atol=1e-11)
    torch.testing.assert_close(unrotate(unrotate(rotated.T, s_out).T, s_in), W, rtol=0, atol=1e-12)


def test_one_outlier_is_spread_over_its_block():
    x = torch.zeros(256)
    x[130] = 8.0
    turned = rotate(x, torch.ones(256))
    torch.testing.assert_close(turned[128:].abs(), torch.full((128,), 8 / 128**0.5))
    assert turned[:128].abs().max() == 0


def test_an_odd_width_changes_signs_only(generator):
    x, signs = torch.randn(2, 33, generator=generator), random_signs(33, generator)
    assert torch.equal(rotate(x, signs), x * signs)


def test_signs_are_plus_and_minus_one_and_follow_the_generator():
    first, again, other = (random_signs(1000, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert set(first.tolist()) == {-1.0, 1.0} and abs(first.mean()) < 0.1
    assert first.dtype == torch.float32


def test_a_constant_that_was_traced_is_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    KEPT.clear()
    with FakeTensorMode():
        mix(torch.ones(2, 8))
    torch.testing.assert_close(mix(mix(torch.eye(8))), torch.eye(8))


def test_training_can_follow_an_evaluation_in_inference_mode():
    KEPT.clear()
    with torch.inference_mode():
        mix(torch.ones(2, 8))
    x = torch.ones(2, 8, requires_grad=True)
    mix(x).sum().backward()  # needs the matrix that the evaluation has left in the cache
    torch.testing.assert_close(x.grad, hadamard(8).sum(1).expand(2, 8))
