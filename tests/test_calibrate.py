"""Calibration and feedback rounding against loops in float64 that follow the definitions, one step at a time.

Checked: second moments token by token, what is shared and what is restored; the damped factor of easy,
singular and dead second moments; feedback rounding against a brute-force search for the codeword of least
loss when the columns still to come may take any value; the identity that the loss is the sum of the vectors'
own rounding errors; feedback that never loses to plain rounding; the refitted codebook against lstsq;
determinism; rows of zeros and outliers; error messages.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lcqat_min import calibrate
from lcqat_min.calibrate import (
    Factor,
    factorize,
    feedback_round,
    plain_round,
    proxy_loss,
    refit,
    round_matrix,
    row_scales,
    second_moments,
)
from lcqat_min.codebook import (
    AffineCodebook,
    Codebook,
    TableCodebook,
    lattice,
    random_planes,
    scalar,
)
from lcqat_min.digits import digits_of

BATCHES = [torch.arange(14).view(2, 7), torch.arange(40, 55).view(3, 5)]  # 29 tokens
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


# Second moments ----------------------------------------------------------------------------------


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def inputs_of(model: nn.Module, layer: nn.Module) -> list[Tensor]:
    """What the layer is fed in BATCHES: one fp64 vector a token."""
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        for batch in BATCHES:
            model(input_ids=batch)
    handle.remove()
    return [token.double() for x in seen for token in x.flatten(0, 1)]


def test_second_moments_token_by_token(tiny_llama):
    model = tiny_llama()
    layers = linears(model)
    moments = second_moments(model, layers, BATCHES)
    assert list(moments) == list(layers) and len(layers) == 14
    for name, layer in layers.items():
        tokens = inputs_of(model, layer)
        by_hand = sum(torch.outer(x, x) for x in tokens) / len(tokens)
        assert moments[name].tokens == len(tokens) == 29
        assert moments[name].H.dtype == torch.float64
        torch.testing.assert_close(moments[name].H, by_hand, rtol=1e-10, atol=1e-12)


class Chain(nn.Module):
    """Two layers on one tensor; `change` may alter it in place or replace it between them."""

    def __init__(self, change):
        super().__init__()
        self.first, self.second, self.change = nn.Linear(3, 3), nn.Linear(3, 3), change

    def forward(self, input_ids, use_cache):
        x = torch.nn.functional.one_hot(input_ids, 3).float()
        self.first(x)
        self.second(input=self.change(x))


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.mul_(2), lambda x: x * 2 if len(x) == 1 else x])
def test_second_moments_of_layers_that_share_their_input_at_times(change):
    model, batches = Chain(change), [torch.tensor([[0, 1, 1]]), torch.tensor([[0, 2], [1, 2]])]
    moments = second_moments(model, {"first": model.first, "second": model.second}, batches)
    for name, factor in (("first", lambda x: x), ("second", change)):
        x = [factor(torch.nn.functional.one_hot(batch, 3).float()).flatten(0, 1).double() for batch in batches]
        by_hand = sum(part.T @ part for part in x) / 7
        torch.testing.assert_close(moments[name].H, by_hand)


def test_second_moments_do_not_depend_on_the_order_of_the_names(tiny_llama):
    model = tiny_llama()
    layers = linears(model)
    moments = second_moments(model, layers, BATCHES)
    other = second_moments(model, dict(reversed(layers.items())), BATCHES)
    assert all(torch.equal(moments[name].H, other[name].H) for name in layers)


def test_second_moments_leave_the_model_as_it_was(tiny_llama):
    for training in (True, False):
        model = tiny_llama().train(training)
        before = {name: p.clone() for name, p in model.named_parameters()}
        second_moments(model, linears(model), BATCHES)
        assert all(module.training == training for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_hooks_are_removed_after_a_failure(tiny_llama):
    model = tiny_llama()
    with pytest.raises(IndexError):
        second_moments(model, linears(model), [*BATCHES, torch.tensor([[10_000]])])
    assert not any(module._forward_pre_hooks for module in model.modules()) and model.training


def test_second_moments_of_nothing(tiny_llama):
    model = tiny_llama()
    with pytest.raises(ValueError, match="no input reached layer 'model.layers.0.self_attn.q_proj', 'model"):
        second_moments(model, linears(model), [])
    with pytest.raises(ValueError, match="no input reached layer 'spare'"):
        second_moments(model, {"spare": nn.Linear(2, 2)}, BATCHES)


def test_second_moments_that_are_not_finite_name_the_layer(tiny_llama):
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"'model.layers.1.self_attn.q_proj' was fed NaN or infinity"):
        second_moments(model, linears(model), BATCHES)


# Factor ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
def test_factor_of_an_easy_matrix(damping):
    H = moments_of(12, seed=3)
    factor = factorize(H, damping)
    damped = H + damping * H.diagonal().mean() * torch.eye(12)
    assert factor.damping == damping and factor.dead == 0
    assert factor.H.dtype == torch.float32 and factor.C.dtype == torch.float64
    assert torch.equal(factor.C, factor.C.tril())
    torch.testing.assert_close(factor.C @ factor.C.T, damped)
    torch.testing.assert_close(factor.H, damped.float())


def singular_moments(why: str) -> Tensor:
    X = torch.randint(-3, 4, (40, 12), generator=seeded(4)).double()
    if why == "few tokens":
        X = X[:5]
    else:
        X[:, 7] = X[:, 2]
    return X.T @ X


@pytest.mark.parametrize("why", ["few tokens", "doubled channel"])
def test_damping_rises_until_singular_moments_have_a_factor(why):
    H = singular_moments(why)
    assert torch.linalg.matrix_rank(H) < 12
    factor = factorize(H, damping=0.0)
    assert 1e-6 <= factor.damping <= 1e-4
    damped = H + factor.damping * H.diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(factor.C @ factor.C.T, damped)
    assert factorize(H).damping == 0.01  # the default is enough


def test_damping_rises_tenfold_and_is_reported():
    factor = factorize(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))  # its least eigenvalue is -2
    assert factor.damping == pytest.approx(10)
    torch.testing.assert_close(factor.H, torch.tensor([[11.0, 3.0], [3.0, 11.0]]))


def test_dead_inputs_get_the_mean_of_the_others():
    H = moments_of(6, seed=5)
    alive = [0, 1, 3, 5]
    H[[2, 4]] = 0
    H[:, [2, 4]] = 0
    mean = H.diagonal()[alive].mean()
    factor = factorize(H, damping=0.1)
    assert factor.dead == 2
    expected = H + 0.1 * mean * torch.eye(6)
    expected[[2, 4], [2, 4]] += mean
    torch.testing.assert_close(factor.C @ factor.C.T, expected)


def test_moments_of_zeros_count_all_inputs_as_dead():
    factor = factorize(torch.zeros(3, 3))
    assert factor.dead == 3
    torch.testing.assert_close(factor.H, 1.01 * torch.eye(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_factorize_refuses_what_is_not_finite(bad):
    H = torch.eye(3)
    H[1, 0] = bad
    with pytest.raises(ValueError, match="second moments hold NaN or infinity: check the calibration text"):
        factorize(H)


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
def test_feedback_rounding_equals_the_slow_definition(kind):
    W, factor, book = a_case(kind, n=20, rows=3)
    scale = row_scales(W, [0.9])[0]
    index, _ = feedback_round(W, scale, book, factor)
    assert index.dtype == torch.int64 and index.shape == (3, 20 // book.dim)
    assert torch.equal(index, slow_feedback(W, scale, book, factor.C @ factor.C.T))
    assert not torch.equal(index, plain_round(W, scale, book)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_may_be_a_view_and_stay_as_they_are(kind):
    W, factor, book = a_case(kind, n=20)
    scale = row_scales(W, [0.9])[0]
    before, view = W.clone(), W.T.contiguous().T
    for matrix in (W, view):
        index, target = feedback_round(matrix, scale, book, factor)
        assert torch.equal(index, feedback_round(before, scale, book, factor)[0])
        target.zero_()
    assert torch.equal(W, before) and torch.equal(view, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 8, 10])
def test_blocks_of_columns_change_the_speed_alone(kind, block, monkeypatch):
    W, factor, book = a_case(kind, n=140)  # more columns than one block, and not a multiple of it
    scale = row_scales(W, [0.9])[0]
    index, target = feedback_round(W, scale, book, factor)
    monkeypatch.setattr(calibrate, "FEEDBACK_BLOCK", block)
    other, other_target = feedback_round(W, scale, book, factor)
    assert torch.equal(index, other)
    torch.testing.assert_close(target, other_target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "planes of 8"])
def test_the_loss_is_the_sum_of_the_vectors_own_errors(kind):
    W, factor, book = a_case(kind, n=24)
    scale, d = row_scales(W, [0.9])[0], book.dim
    index, target = feedback_round(W, scale, book, factor)
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
    index, target = feedback_round(W, scale, book, factorize(torch.eye(24)))
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
        exact = exact_loss(rounded.weight(), W, factor)
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
    assert torch.equal(together.loss, losses.amin(0))
    for row, best in enumerate(losses.argmin(0).tolist()):
        assert together.scale[row] == scales[best][row]
        for name in ("index", "target"):
            assert torch.equal(getattr(together, name)[row], getattr(alone[best], name)[row])
    assert len(losses.argmin(0).unique()) > 1


def test_a_rounded_matrix_says_what_it_is():
    W, factor, book = a_case("planes", n=24)
    rounded = round_matrix(W, factor, book, row_scales(W))
    assert rounded.codebook is book and rounded.weight().shape == W.shape
    assert rounded.index.shape == (5, 6) and rounded.index.dtype == torch.int64
    assert rounded.target.shape == W.shape and rounded.loss.dtype == torch.float64
    for row in range(5):
        by_hand = torch.cat([book.codewords()[i] for i in rounded.index[row]]) * rounded.scale[row]
        torch.testing.assert_close(rounded.weight()[row], by_hand)


def test_rows_do_not_interact():
    W, factor, book = a_case("planes", n=24, rows=6)
    whole = round_matrix(W, factor, book, row_scales(W))
    part = round_matrix(W[[4, 1]], factor, book, row_scales(W[[4, 1]]))
    assert torch.equal(part.index, whole.index[[4, 1]]) and torch.equal(part.scale, whole.scale[[4, 1]])


@pytest.mark.parametrize("kind", [*KINDS, "planes of 8"])
def test_two_runs_agree_bit_for_bit(kind):
    W, factor, book = a_case(kind, n=40, rows=8)
    first = round_matrix(W, factor, book, row_scales(W))
    again = round_matrix(W.clone(), factorize(moments_of(40, 1)), a_codebook(kind), row_scales(W))
    for name in ("index", "scale", "target", "loss"):
        assert torch.equal(getattr(first, name), getattr(again, name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_stays_zero(kind):
    W, factor, book = a_case(kind, n=24)
    W[2] = 0
    rounded = round_matrix(W, factor, book, row_scales(W))
    assert (rounded.scale > 0).all()
    assert rounded.weight()[2].abs().max() < 1e-10
    assert all(torch.isfinite(getattr(rounded, name)).all() for name in ("scale", "target", "loss"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_outlier_leaves_everything_finite(kind):
    W, factor, book = a_case(kind, n=24)
    before = round_matrix(W, factor, book, row_scales(W))
    W[1, 5] = 1e12
    rounded = round_matrix(W, factor, book, row_scales(W))
    assert all(torch.isfinite(getattr(rounded, name)).all() for name in ("scale", "target", "loss"))
    others = [0, 2, 3, 4]
    assert torch.equal(rounded.index[others], before.index[others])


def test_row_scales_are_shares_of_the_root_mean_square():
    W = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    first, second = row_scales(W, [0.5, 1.0])
    torch.testing.assert_close(first, torch.tensor([1.25, calibrate.SMALLEST_SCALE]))
    torch.testing.assert_close(second, torch.tensor([2.5, calibrate.SMALLEST_SCALE]))


@pytest.mark.parametrize(("n", "inputs"), [(10, 10), (12, 8)])
def test_round_matrix_refuses_what_does_not_fit(n, inputs):
    W, factor = torch.ones(2, n), factorize(torch.eye(inputs))
    got = f"rows of {n} weights, moments of {inputs} inputs, vectors of 4"
    with pytest.raises(ValueError, match=got + ".*pad both"):
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
    q = torch.cat([digits_of(rounded.index, k, book.levels), torch.ones(40, 3, 1)], dim=2).double()
    columns = []  # one for each of the d (k + 1) numbers: what it adds to the output, row below row
    for i in range(d):
        for j in range(k + 1):
            change = torch.zeros(40, 3, d, dtype=torch.float64)
            change[:, :, i] = rounded.scale[:, None] * q[:, :, j]
            columns.append((change.flatten(1) @ factor.C).flatten())
    wanted = (W.double() @ factor.C).flatten()
    solution = torch.linalg.lstsq(torch.stack(columns, dim=1), wanted).solution.view(d, k + 1)
    refitted = refit(W, rounded, factor.H)
    assert refitted.levels == book.levels
    torch.testing.assert_close(refitted.A, solution[:, :k].float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(refitted.b, solution[:, k].float(), rtol=1e-3, atol=1e-4)


@given(st.sampled_from(["lattice", "planes"]), st.integers(1, 10), st.integers(1, 20), st.integers(0, 2**31))
def test_refit_never_raises_the_loss_of_fixed_codes(kind, vectors, rows, seed):
    W, factor, book = a_case(kind, n=4 * vectors, rows=rows, seed=seed)
    rounded = round_matrix(W, factor, book, row_scales(W))
    decoded = refit(W, rounded, factor.H).decode(rounded.index).flatten(1) * rounded.scale[:, None]
    before, after = exact_loss(rounded.weight(), W, factor).sum(), exact_loss(decoded, W, factor).sum()
    assert after <= before * (1 + 1e-5)


def test_refit_pays_where_the_codebook_does_not_suit_the_weights():
    W, factor, _ = a_case("planes", n=24, rows=40)
    unsuited = AffineCodebook(1.3 * torch.eye(4), torch.full((4,), 0.2), 4)
    rounded = round_matrix(W, factor, unsuited, row_scales(W))
    decoded = refit(W, rounded, factor.H).decode(rounded.index).flatten(1) * rounded.scale[:, None]
    assert exact_loss(decoded, W, factor).sum() < 0.95 * exact_loss(rounded.weight(), W, factor).sum()
