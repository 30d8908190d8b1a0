"""Rounding with feedback against loops in float64 that follow the definition, one vector at a time.

Checked: feedback rounding against a brute-force search for the codeword of least loss when the columns still to come
may take any value; the identity that the loss is the sum of the vectors' own rounding errors; feedback that never loses
to plain rounding; the refitted codebook against lstsq; determinism; rows of zeros and outliers; error messages.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lcqat_min.codebook import AffineCodebook, Codebook, TableCodebook, lattice, random_planes, scalar
from lcqat_min.codebook.digits import digits_of
from lcqat_min.ptq import ldlq as feedback
from lcqat_min.ptq.ldlq import ldlq_round, plain_round, proxy_loss, refit, round_matrix, row_scales
from lcqat_min.ptq.moments import Factor, factorize

KINDS = ("scalar", "lattice", "planes", "table")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_codebook(kind: str) -> Codebook:
    g = seeded(1)
    return {
        "scalar": scalar(1.0),
        "lattice": AffineCodebook(torch.eye(4) + 0.2 * torch.randn(4, 4, generator=g), torch.zeros(4), 4),
        "planes": random_planes(4, g),
        "table": TableCodebook(torch.randn(256, 4, generator=g)),
        "planes of 8": random_planes(8, g),
    }[kind]


def moments_of(n: int, seed: int, tokens: int = 200) -> Tensor:
    """fp64 [n, n]: second moments of inputs of which neighbours are alike and some are large."""
    X = torch.randn(tokens, n, generator=seeded(seed), dtype=torch.float64)
    X[:, 1:] += 0.8 * X[:, :-1]
    X[:, :: max(1, n // 3)] *= 3
    return X.T @ X / tokens


def a_case(kind: str, n: int, rows: int = 5, seed: int = 0) -> tuple[Tensor, Factor, Codebook]:
    W = torch.randn(rows, n, generator=seeded(seed)) * torch.linspace(0.02, 2, rows)[:, None]
    return W, factorize(moments_of(n, seed + 1)), a_codebook(kind)


def exact_loss(W_hat: Tensor, W: Tensor, factor: Factor) -> Tensor:
    """fp64 [out]: e H e^T with the factor in fp64."""
    return ((W_hat.double() - W.double()) @ factor.C).square().sum(1)


def test_proxy_loss_is_the_mean_squared_change_of_the_output(generator):
    X, e = torch.randn(50, 6, generator=generator), torch.randn(3, 6, generator=generator)
    loss = proxy_loss(e, X.T @ X / 50)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, (e @ X.T).square().mean(1).double(), rtol=1e-5, atol=1e-6)


# Feedback ----------------------------------------------------------------------------------------


def slow_feedback(W: Tensor, scale: Tensor, book: Codebook, H: Tensor) -> Tensor:
    """int64 [out, n/d], by the meaning of feedback and without its algebra.

    From the last vector to the first: every codeword is tried, and the one kept has the least loss that would
    be left if the weights before it could take any value. (Minimised over those, e H e^T is that of a Schur
    complement of H.)
    """
    d, words, H = book.dim, book.codewords().double(), H.double()
    index = torch.empty(len(W), W.shape[1] // d, dtype=torch.long)
    for row, weights in enumerate(W.double() / scale.double()[:, None]):
        error = torch.zeros_like(weights)
        for k in range(W.shape[1] - d, -1, -d):
            rest = H[k:, k:] - H[k:, :k] @ torch.linalg.solve(H[:k, :k], H[:k, k:])
            losses = []
            for word in words:
                error[k : k + d] = word - weights[k : k + d]
                losses.append(error[k:] @ rest @ error[k:])
            best = torch.stack(losses).argmin()
            error[k : k + d] = words[best] - weights[k : k + d]
            index[row, k // d] = best
    return index


@pytest.mark.parametrize("kind", KINDS)
def test_ldlq_rounding_equals_the_slow_definition(kind):
    W, factor, book = a_case(kind, n=20, rows=3)
    scale = row_scales(W, [0.9])[0]
    index, _ = ldlq_round(W, scale, book, factor)
    assert index.dtype == torch.int64 and index.shape == (3, 20 // book.dim)
    assert torch.equal(index, slow_feedback(W, scale, book, factor.C @ factor.C.T))
    assert not torch.equal(index, plain_round(W, scale, book)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_may_be_a_view_and_stay_as_they_are(kind):
    W, factor, book = a_case(kind, n=20)
    scale = row_scales(W, [0.9])[0]
    before, view = W.clone(), W.T.contiguous().T
    for matrix in (W, view):
        index, target = ldlq_round(matrix, scale, book, factor)
        assert torch.equal(index, ldlq_round(before, scale, book, factor)[0])
        target.zero_()
    assert torch.equal(W, before) and torch.equal(view, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 8, 10])
def test_blocks_of_columns_change_the_speed_alone(kind, block, monkeypatch):
    W, factor, book = a_case(kind, n=140)  # more columns than one block, and not a multiple of it
    scale = row_scales(W, [0.9])[0]
    index, target = ldlq_round(W, scale, book, factor)
    monkeypatch.setattr(feedback, "FEEDBACK_BLOCK", block)
    other, other_target = ldlq_round(W, scale, book, factor)
    assert torch.equal(index, other)
    torch.testing.assert_close(target, other_target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "planes of 8"])
def test_the_loss_is_the_sum_of_the_vectors_own_errors(kind):
    W, factor, book = a_case(kind, n=24)
    scale, d = row_scales(W, [0.9])[0], book.dim
    index, target = ldlq_round(W, scale, book, factor)
    own = (target - book.decode(index).flatten(1)).double() * scale.double()[:, None]
    parts = [own[:, k : k + d] @ factor.C[k : k + d, k : k + d] for k in range(0, 24, d)]
    W_hat = book.decode(index).flatten(1) * scale[:, None]
    torch.testing.assert_close(
        sum(part.square().sum(1) for part in parts), exact_loss(W_hat, W, factor), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_without_correlation_leave_nothing_to_feed_back(kind):
    W, _, book = a_case(kind, n=24)
    scale = row_scales(W, [0.9])[0]
    index, target = ldlq_round(W, scale, book, factorize(torch.eye(24)))
    plain, plain_target = plain_round(W, scale, book)
    assert torch.equal(index, plain) and torch.equal(target, plain_target)
    assert torch.equal(plain_target, W / scale[:, None])


# Rounding a matrix -------------------------------------------------------------------------------


@given(st.sampled_from(KINDS), st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**31))
def test_feedback_never_loses_to_plain_rounding(kind, vectors, rows, seed):
    W, factor, book = a_case(kind, n=4 * vectors, rows=rows, seed=seed)
    plain = round_matrix(W, factor, book, row_scales(W), feedback=False)
    fed = round_matrix(W, factor, book, row_scales(W))
    assert (fed.loss <= plain.loss).all()
    for rounded in (plain, fed):
        exact = exact_loss(rounded.coded.weight(), W, factor)
        torch.testing.assert_close(rounded.loss, exact, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", [*KINDS, "planes of 8"])
def test_feedback_pays_where_inputs_are_correlated(kind):
    W, factor, book = a_case(kind, n=64, rows=16)
    plain = round_matrix(W, factor, book, row_scales(W), feedback=False)
    fed = round_matrix(W, factor, book, row_scales(W))
    assert fed.loss.sum() < 0.8 * plain.loss.sum()


def test_each_row_gets_its_best_scale():
    W, factor, book = a_case("planes", n=24)
    scales = row_scales(W)
    alone = [round_matrix(W, factor, book, [scale]) for scale in scales]
    together = round_matrix(W, factor, book, scales)
    losses = torch.stack([rounded.loss for rounded in alone])
    torch.testing.assert_close(together.loss, losses.amin(0), rtol=1e-4, atol=0)  # one product of all, or one each
    first, second = losses.sort(0).values[:2]
    assert (second > 1.001 * first).all()  # so which scale is best depends on no digit
    for row, best in enumerate(losses.argmin(0).tolist()):
        assert together.coded.scale[row] == scales[best][row]
        assert torch.equal(together.coded.index[row], alone[best].coded.index[row])
        torch.testing.assert_close(together.target[row], alone[best].target[row], rtol=1e-4, atol=1e-5)
    assert len(losses.argmin(0).unique()) > 1


def test_a_rounded_matrix_says_what_it_is():
    W, factor, book = a_case("planes", n=24)
    rounded = round_matrix(W, factor, book, row_scales(W))
    assert rounded.coded.codebook is book and rounded.coded.weight().shape == W.shape
    assert rounded.coded.index.shape == (5, 6) and rounded.coded.index.dtype == torch.int64
    assert rounded.target.shape == W.shape and rounded.loss.dtype == torch.float64
    for row in range(5):
        by_hand = torch.cat([book.codewords()[i] for i in rounded.coded.index[row]]) * rounded.coded.scale[row]
        torch.testing.assert_close(rounded.coded.weight()[row], by_hand)


def test_rows_do_not_interact():
    W, factor, book = a_case("planes", n=24, rows=6)
    whole = round_matrix(W, factor, book, row_scales(W))
    part = round_matrix(W[[4, 1]], factor, book, row_scales(W[[4, 1]]))
    assert torch.equal(part.coded.index, whole.coded.index[[4, 1]])
    torch.testing.assert_close(part.coded.scale, whole.coded.scale[[4, 1]], rtol=1e-6, atol=0)


def numbers(rounded: feedback.Rounded) -> list[torch.Tensor]:
    return [rounded.coded.index, rounded.coded.scale, rounded.target, rounded.loss]


@pytest.mark.parametrize("kind", [*KINDS, "planes of 8"])
def test_two_runs_agree_bit_for_bit(kind):
    W, factor, book = a_case(kind, n=40, rows=8)
    first = round_matrix(W, factor, book, row_scales(W))
    again = round_matrix(W.clone(), factorize(moments_of(40, 1)), a_codebook(kind), row_scales(W))
    for one, other in zip(numbers(first), numbers(again), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_stays_zero(kind):
    W, factor, book = a_case(kind, n=24)
    W[2] = 0
    rounded = round_matrix(W, factor, book, row_scales(W))
    assert (rounded.coded.scale > 0).all()
    assert rounded.coded.weight()[2].abs().max() < 1e-10
    assert all(torch.isfinite(tensor).all() for tensor in numbers(rounded))


@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_outlier_leaves_everything_finite(kind):
    W, factor, book = a_case(kind, n=24)
    before = round_matrix(W, factor, book, row_scales(W))
    W[1, 5] = 1e12
    rounded = round_matrix(W, factor, book, row_scales(W))
    assert all(torch.isfinite(tensor).all() for tensor in numbers(rounded))
    others = [0, 2, 3, 4]
    assert torch.equal(rounded.coded.index[others], before.coded.index[others])


def test_row_scales_are_shares_of_the_root_mean_square():
    W = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    first, second = row_scales(W, [0.5, 1.0])
    torch.testing.assert_close(first, torch.tensor([1.25, feedback.SMALLEST_SCALE]))
    torch.testing.assert_close(second, torch.tensor([2.5, feedback.SMALLEST_SCALE]))


@pytest.mark.parametrize(("n", "inputs"), [(10, 10), (12, 8)])
def test_round_matrix_refuses_what_does_not_fit(n, inputs):
    W, factor = torch.ones(2, n), factorize(torch.eye(inputs))
    got = f"rows of {n} weights, moments of {inputs} inputs, vectors of 4"
    with pytest.raises(ValueError, match=got + ".*pad them"):
        round_matrix(W, factor, lattice(4), row_scales(W))


def test_round_matrix_refuses_what_is_not_finite():
    W = torch.ones(2, 4)
    W[1, 1] = float("nan")
    with pytest.raises(ValueError, match="the weights hold NaN or infinity"):
        round_matrix(W, factorize(torch.eye(4)), lattice(4), row_scales(W))


# Refitting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lattice", "planes"])
def test_refit_is_the_least_squares_solution(kind):
    W, factor, book = a_case(kind, n=12, rows=40)
    rounded = round_matrix(W, factor, book, row_scales(W))
    d, k = book.A.shape
    q = torch.cat([digits_of(rounded.coded.index, k, book.levels), torch.ones(40, 3, 1)], dim=2).double()
    columns = []  # one for each of the d (k + 1) numbers: what it adds to the output, row below row
    for i in range(d):
        for j in range(k + 1):
            change = torch.zeros(40, 3, d, dtype=torch.float64)
            change[:, :, i] = rounded.coded.scale[:, None] * q[:, :, j]
            columns.append((change.flatten(1) @ factor.C).flatten())
    wanted = (W.double() @ factor.C).flatten()
    solution = torch.linalg.lstsq(torch.stack(columns, dim=1), wanted).solution.view(d, k + 1)
    refitted = refit(W, rounded.coded, factor.H)
    assert refitted.levels == book.levels
    torch.testing.assert_close(refitted.A, solution[:, :k].float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(refitted.b, solution[:, k].float(), rtol=1e-3, atol=1e-4)


@given(st.sampled_from(["lattice", "planes"]), st.integers(1, 10), st.integers(1, 20), st.integers(0, 2**31))
def test_refit_never_raises_the_loss_of_fixed_codes(kind, vectors, rows, seed):
    W, factor, book = a_case(kind, n=4 * vectors, rows=rows, seed=seed)
    rounded = round_matrix(W, factor, book, row_scales(W))
    decoded = refit(W, rounded.coded, factor.H).decode(rounded.coded.index).flatten(1) * rounded.coded.scale[:, None]
    before, after = exact_loss(rounded.coded.weight(), W, factor).sum(), exact_loss(decoded, W, factor).sum()
    assert after <= before * (1 + 1e-5)


def test_refit_pays_where_the_codebook_does_not_suit_the_weights():
    W, factor, _ = a_case("planes", n=24, rows=40)
    unsuited = AffineCodebook(1.3 * torch.eye(4), torch.full((4,), 0.2), 4)
    rounded = round_matrix(W, factor, unsuited, row_scales(W))
    decoded = refit(W, rounded.coded, factor.H).decode(rounded.coded.index).flatten(1) * rounded.coded.scale[:, None]
    assert exact_loss(decoded, W, factor).sum() < 0.95 * exact_loss(rounded.coded.weight(), W, factor).sum()
