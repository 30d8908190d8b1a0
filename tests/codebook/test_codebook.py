"""Codebooks against brute force, least squares by lstsq, and the errors that the module's table promises.

Checked: the index layout and its inverse; bit-planes that equal the paper's form bit for bit; every search
against all codewords in float64, with and without a metric; one round of `fit` against textbook solutions;
that a fit never does harm, revives dead cells and survives degenerate data; mean squared errors on fresh
weights; why tied planes gain nothing; determinism; error messages.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lcqat_min.codebook import (
    AffineCodebook,
    Codebook,
    TableCodebook,
    frame_planes,
    lattice,
    lloyd,
    random_planes,
    scalar,
    search,
)
from lcqat_min.codebook.digits import digits_of, index_of
from lcqat_min.codebook.lloyd import fit, mean_squared_error
from lcqat_min.codebook.table import table_start

D4 = torch.tensor([[2.0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # the densest lattice

FRAME = frame_planes()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(count: int, dim: int, seed: int) -> Tensor:
    """fp32 [count, dim]: normal weights of exactly unit variance, so that an error is a share of it."""
    x = torch.randn(count, dim, generator=seeded(seed))
    return (x - x.mean()) / x.std()


def squared_errors(x: Tensor, words: Tensor, metric: Tensor | None) -> Tensor:
    """float64 [N, K]: |M^T (x - w)|^2 of every vector and codeword."""
    M = torch.eye(x.shape[1], dtype=torch.float64) if metric is None else metric.double()
    moved = words.double() @ M
    return torch.stack([(v - moved).square().sum(1) for v in x.double() @ M])


def a_metric(dim: int, seed: int, tokens: int = 64) -> Tensor:
    """fp32 [dim, dim], lower triangular: the Cholesky factor of second moments of a few correlated inputs."""
    X = torch.randn(tokens, dim, generator=seeded(seed), dtype=torch.float64)
    X[:, 1:] += 0.7 * X[:, :-1]
    return torch.linalg.cholesky(X.T @ X / tokens).float()


def nearest_in(book: Codebook, x: Tensor, metric: Tensor | None) -> Tensor:
    """Search in the second of three metrics, so that a mixed-up group shows."""
    if metric is None:
        return book.encode(x)
    return book.searcher(torch.stack([torch.eye(book.dim), metric, metric.T]))(x.T, 1)


def some_books() -> dict[str, Codebook]:
    """Codebooks that are searched exactly, with skew maps and offsets."""
    g = seeded(1)
    skew = torch.eye(4) + 0.4 * torch.randn(4, 4, generator=g)
    return {
        "scalar": scalar(0.9),
        "scalar, negative step": AffineCodebook(torch.tensor([[-0.7]]), torch.tensor([0.2]), 4),
        "one plane": AffineCodebook(torch.tensor([[0.8]]), torch.tensor([-0.1]), 2),
        "lattice": AffineCodebook(skew, 0.3 * torch.randn(4, generator=g), 4),
        "planes 2": AffineCodebook(torch.randn(2, 4, generator=g), torch.randn(2, generator=g), 2),
        "planes 3": random_planes(3, g),
        "planes 4": AffineCodebook(random_planes(4, g).A, torch.randn(4, generator=g), 2),
        "table": TableCodebook(torch.randn(256, 4, generator=g)),
    }


@pytest.fixture(scope="module")
def fitted_scalar() -> AffineCodebook:
    return fit(normal(30_000, 1, seed=1), scalar(), rounds=20)


@pytest.fixture(scope="module")
def planes_4() -> AffineCodebook:
    """Most of the way on few vectors, the rest on many."""
    rough = fit(normal(12_000, 4, seed=1), random_planes(4, seeded(0)), rounds=40)
    return fit(normal(60_000, 4, seed=2), rough, rounds=20)


@pytest.fixture(scope="module")
def planes_8() -> AffineCodebook:
    """Two codebooks of half the size side by side, then free."""
    A = torch.block_diag(FRAME.A, FRAME.A) + 0.05 * torch.randn(8, 16, generator=seeded(0))
    return fit(normal(12_000, 8, seed=3), AffineCodebook(A, torch.zeros(8), 2), rounds=30)


@pytest.fixture(scope="module")
def table(planes_4) -> TableCodebook:
    return fit(normal(100_000, 4, seed=4), TableCodebook(planes_4.codewords()), rounds=12)


# Digits and indices ------------------------------------------


def test_digit_0_sits_in_the_highest_bits():
    assert digits_of(torch.tensor(0b00_01_10_11), 4, 4).tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert digits_of(torch.tensor(0b1000_0010), 8, 2).tolist() == [1, -1, -1, -1, -1, -1, 1, -1]
    assert digits_of(torch.tensor([[3], [0]], dtype=torch.uint8), 1, 4).tolist() == [[[1.5]], [[-1.5]]]


@pytest.mark.parametrize(("count", "levels"), [(8, 2), (4, 4)])
def test_every_byte_comes_back_and_its_complement_is_its_negative(count, levels):
    every = torch.arange(256)
    digits = digits_of(every, count, levels)
    assert digits.shape == (256, count) and len(digits.unique(dim=0)) == 256
    assert torch.equal(index_of(digits, levels), every)
    assert torch.equal(index_of(-digits, levels), 255 - every)


@given(st.sampled_from([2, 4]), st.integers(1, 10), st.data())
def test_digits_come_back_for_any_count(levels, count, data):
    index = torch.tensor(data.draw(st.lists(st.integers(0, levels**count - 1), min_size=1, max_size=6)))
    digits = digits_of(index, count, levels)
    assert digits.shape == (len(index), count)
    assert set(digits.flatten().tolist()) <= ({-1.0, 1.0} if levels == 2 else {-1.5, -0.5, 0.5, 1.5})
    assert torch.equal(index_of(digits, levels), index)
    assert torch.equal(index_of(-digits, levels), levels**count - 1 - index)


def test_negated_digits_mirror_the_codeword_at_b():
    book = some_books()["planes 4"]
    torch.testing.assert_close(book.codewords().flip(0) - book.b, book.b - book.codewords())


# What a book is ----------------------------------------------


@pytest.mark.parametrize(
    ("book", "dim", "bits", "numbers"),
    [
        (scalar(), 1, 2, 2),
        (lattice(4), 4, 8, 20),
        (random_planes(4, seeded(0)), 4, 8, 36),
        (random_planes(8, seeded(0)), 8, 16, 136),
        (TableCodebook(torch.zeros(256, 4)), 4, 8, 1024),
    ],
    ids=["scalar", "tied", "planes 4", "planes 8", "table"],
)
def test_sizes_of_the_five_codebooks(book, dim, bits, numbers):
    assert (book.dim, book.bits, book.numbers()) == (dim, bits, numbers)
    assert bits == 2 * dim and book.codewords().shape == (2**bits, dim)
    assert torch.equal(book.to("cpu").codewords(), book.codewords())


@pytest.mark.parametrize("name", some_books())
def test_decode_takes_any_shape_and_integer(name):
    book = some_books()[name]
    index = torch.randint(0, 1 << book.bits, (3, 5), generator=seeded(0))
    decoded = book.decode(index)
    torch.testing.assert_close(decoded, book.codewords()[index])  # another shape may add in another order
    assert torch.equal(book.decode(index.to(torch.uint8)), decoded)
    assert torch.equal(book.decode(index.to(torch.int32)), decoded)


def test_the_scalar_grid_by_hand():
    assert scalar(2.0).codewords().flatten().tolist() == [-3, -1, 1, 3]
    x = torch.tensor([[-99.0], [-2.1], [-1.9], [0.1], [1.9], [2.1], [99.0]])
    assert scalar(2.0).encode(x).tolist() == [0, 0, 1, 2, 2, 3, 3]


def test_the_lattice_is_scalar_grids_side_by_side():
    x = normal(50, 4, seed=0)
    one_by_one = scalar(0.8).decode(scalar(0.8).encode(x.reshape(-1, 1))).view(50, 4)
    torch.testing.assert_close(lattice(4, 0.8).decode(lattice(4, 0.8).encode(x)), one_by_one)


# fp16 numbers of 2^-8 to 2 in size. Their multiples by 1/2 and 3/2 lie on a grid of 2^-19, and a sum of five
# of them stays below 2^4: 23 bits, so that fp32 adds them without an error, in whatever order.
half_precision = st.builds(
    lambda sign, mantissa, power: sign * mantissa * 2.0**power,
    st.sampled_from([-1, 1]),
    st.integers(1024, 2047),
    st.integers(-18, -10),
)


@given(st.lists(half_precision, min_size=20, max_size=20))
def test_planes_equal_the_paper_form_bit_for_bit(values):
    numbers = torch.tensor(values)
    assert torch.equal(numbers.half().float(), numbers)
    tied = AffineCodebook(numbers[:16].view(4, 4), numbers[16:], 4)
    exact = digits_of(torch.arange(256), 4, 4).double() @ tied.A.double().T + tied.b.double()

    planes = tied.as_planes()
    assert planes.levels == 2 and planes.bits == 8
    assert torch.equal(tied.codewords().double(), exact)
    assert torch.equal(planes.codewords().double(), exact)

    # [A, A/2]: the four high bits first, then the four low ones. The same codewords in another order.
    side_by_side = AffineCodebook(torch.cat([tied.A, tied.A / 2], dim=1), tied.b, 2)
    bits = digits_of(torch.arange(256), 8, 2)
    index = index_of(torch.cat([bits[:, 0::2], bits[:, 1::2]], dim=1), 2)
    assert torch.equal(side_by_side.decode(index).double(), exact)


def test_planes_are_their_own_planes():
    book = random_planes(4, seeded(0))
    assert book.as_planes() is book


# Search ------------------------------------------------------


@pytest.mark.parametrize("with_metric", [False, True], ids=["plain", "metric"])
@pytest.mark.parametrize("name", some_books())
def test_search_finds_the_nearest_of_all_codewords(name, with_metric):
    book = some_books()[name]
    x = 1.5 * normal(400, book.dim, seed=5)
    metric = a_metric(book.dim, seed=6) if with_metric else None
    index = nearest_in(book, x, metric)
    errors = squared_errors(x, book.codewords(), metric)
    assert index.dtype == torch.int64 and index.shape == (400,)
    chosen = errors.gather(1, index[:, None]).squeeze(1)
    torch.testing.assert_close(chosen, errors.amin(1), rtol=1e-5, atol=1e-5)
    assert (index == errors.argmin(1)).double().mean() > 0.99  # the rest are ties, to fp32


def test_the_metric_changes_the_choice():
    book, x = some_books()["planes 4"], normal(400, 4, seed=5)
    assert (book.encode(x) != nearest_in(book, x, a_metric(4, seed=6))).any()


@pytest.mark.parametrize("name", some_books())
def test_a_codeword_is_encoded_as_itself(name):
    book = some_books()[name]
    assert torch.equal(book.encode(book.codewords()), torch.arange(1 << book.bits))


@pytest.mark.parametrize("name", some_books())
def test_a_codebook_that_is_being_learned_can_be_searched(name):
    book, x = some_books()[name], normal(50, some_books()[name].dim, seed=5)
    wanted = book.encode(x)
    (book.table if isinstance(book, TableCodebook) else book.A).requires_grad_()
    assert torch.equal(book.encode(x.requires_grad_()), wanted)


def test_ties_go_to_the_smallest_index():
    book = TableCodebook(torch.tensor([[0.0], [1.0], [1.0], [3.0]]))
    assert book.encode(torch.tensor([[1.1]])).tolist() == [1]


@pytest.mark.parametrize("with_metric", [False, True], ids=["plain", "metric"])
@pytest.mark.parametrize("kind", ["planes", "lattice"])
def test_search_by_halves_comes_close_to_all_65536_codewords(kind, with_metric, planes_8):
    skew = AffineCodebook(torch.eye(8) + 0.1 * torch.randn(8, 8, generator=seeded(2)), torch.zeros(8), 4)
    book = planes_8 if kind == "planes" else skew
    x, metric = normal(200, 8, seed=7), a_metric(8, seed=8) if with_metric else None
    index = nearest_in(book, x, metric)
    errors = squared_errors(x, book.codewords(), metric)
    chosen = errors.gather(1, index[:, None])
    assert chosen.sum() <= (1.02 if with_metric else 1.01) * errors.amin(1).sum()
    assert (index == errors.argmin(1)).double().mean() > 0.8


@pytest.mark.parametrize("name", [*some_books(), "planes 8"])
def test_search_in_parts_gives_the_same(name, monkeypatch):
    book = (some_books() | {"planes 8": random_planes(8, seeded(3))})[name]
    x = normal(70, book.dim, seed=9)
    whole = book.encode(x)
    monkeypatch.setitem(search.SCORES_AT_ONCE, "cpu", 1 << 12)  # 16 to 32 vectors at a time, or 2 with 16 bits
    assert torch.equal(book.encode(x), whole)
    assert book.encode(x[:0]).shape == (0,)


# Fit ---------------------------------------------------------


@pytest.mark.parametrize("name", ["scalar", "lattice", "planes 4"])
def test_one_round_is_a_least_squares_solution(name):
    start = some_books()[name]
    x = normal(2000, start.dim, seed=10) @ (torch.eye(start.dim) + 0.2)
    q = digits_of(start.encode(x), start.A.shape[1], start.levels).double()
    solution = torch.linalg.lstsq(torch.cat([q, torch.ones(2000, 1)], dim=1), x.double()).solution
    book = fit(x, start, rounds=1)
    torch.testing.assert_close(book.A, solution[:-1].T.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(book.b, solution[-1].float(), rtol=1e-4, atol=1e-5)


def test_one_round_of_a_table_is_the_mean_of_each_cell():
    x = normal(500, 2, seed=11)
    start = table_start(x, 16, seeded(0))
    index = start.encode(x)
    means = torch.stack([x[index == cell].mean(0) for cell in range(16)])
    torch.testing.assert_close(fit(x, start, rounds=1).table, means)


def test_fit_finds_the_map_behind_the_vectors():
    A = torch.tensor([[1.0, 0.4, 0.1, 0.3], [-0.2, 0.1, 0.9, -0.5]])
    truth = AffineCodebook(A, torch.tensor([0.3, -0.1]), 2)
    x = truth.decode(torch.randint(0, 16, (500,), generator=seeded(0)))
    start = AffineCodebook(truth.A + 0.05, truth.b - 0.05, 2)
    assert mean_squared_error(x, start) > 1e-3
    assert mean_squared_error(x, fit(x, start, rounds=4)) < 1e-10


@given(
    st.sampled_from(["scalar", "lattice", "planes 2", "planes 4", "table"]),
    st.integers(1, 300),
    st.integers(0, 5),
    st.floats(0.01, 100),
    st.integers(0, 2**31),
)
def test_fit_is_never_worse_than_its_start(name, count, rounds, size, seed):
    start = some_books()[name]
    x = size * torch.randn(count, start.dim, generator=seeded(seed))
    before, after = mean_squared_error(x, start), mean_squared_error(x, fit(x, start, rounds))
    assert after <= before * (1 + 1e-6)


def test_fit_keeps_the_best_codebook_that_it_has_seen(monkeypatch):
    x, start = normal(300, 4, seed=17), random_planes(4, seeded(0))
    least = mean_squared_error(x, fit(x, start, rounds=1))
    monkeypatch.setattr(lloyd, "MOMENTUM", 50.0)  # leaps far over the valley
    assert mean_squared_error(x, fit(x, start, rounds=8)) <= least


def test_the_last_two_solutions_are_not_carried_on(monkeypatch):
    x, start = normal(300, 4, seed=17), random_planes(4, seeded(0))
    books = []
    for momentum in (0.0, 50.0):
        monkeypatch.setattr(lloyd, "MOMENTUM", momentum)
        books.append(fit(x, start, rounds=2))
    assert torch.equal(books[0].A, books[1].A)


def test_momentum_pays(monkeypatch):
    x, starts = normal(6000, 4, seed=18), [random_planes(4, seeded(seed)) for seed in range(3)]
    errors = []
    for momentum in (lloyd.MOMENTUM, 0.0):
        monkeypatch.setattr(lloyd, "MOMENTUM", momentum)
        errors.append(sum(mean_squared_error(x, fit(x, start, rounds=60)) for start in starts))
    assert errors[0] < 0.995 * errors[1]


def test_no_rounds_give_the_start_back():
    start = random_planes(4, seeded(0))
    assert fit(normal(100, 4, seed=0), start, rounds=0) is start


def test_dead_cells_are_revived():
    x = normal(1000, 2, seed=12)
    words = torch.cat([x[:8], 1000 + torch.randn(8, 2, generator=seeded(0))])
    assert len(TableCodebook(words).encode(x).unique()) <= 8
    book = fit(x, TableCodebook(words), rounds=4)
    assert len(book.encode(x).unique()) == 16
    assert mean_squared_error(x, book) < 0.5 * mean_squared_error(x, TableCodebook(words[:8]))


def test_a_table_may_have_more_cells_than_there_are_vectors():
    x = normal(5, 2, seed=13)
    book = fit(x, TableCodebook(torch.full((16, 2), 50.0) + torch.arange(16)[:, None]), rounds=3)
    assert mean_squared_error(x, book) < 1e-12


@pytest.mark.parametrize(
    "start",
    [lattice(1), lattice(4), random_planes(4, seeded(0)), random_planes(8, seeded(0))],
    ids=["lattice 1", "lattice 4", "planes 4", "planes 8"],
)
def test_a_matrix_of_zeros_is_fitted_by_zeros(start):
    x = torch.zeros(40, start.dim)
    book = fit(x, start, rounds=4)
    index = book.encode(x)
    assert book.decode(index).abs().max() < 1e-6
    assert 0 <= index.min() and index.max() < 1 << book.bits


@pytest.mark.parametrize("name", ["lattice", "planes 4", "table"])
def test_two_fits_agree_bit_for_bit(name):
    x, start = normal(1000, 4, seed=14), some_books()[name]
    first, again = fit(x, start, rounds=6), fit(x.clone(), start, rounds=6)
    assert torch.equal(first.codewords(), again.codewords())
    assert torch.equal(first.encode(x), again.encode(x))


def test_table_start_draws_different_vectors_and_follows_the_generator():
    x = torch.arange(40.0).view(20, 2)
    first, again, other = (table_start(x, 16, seeded(seed)).table for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 16 and all((row == x).all(1).any() for row in first)


def test_random_planes_follow_the_generator():
    first, again, other = (random_planes(4, seeded(seed)).A for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# Mean squared errors on fresh normal vectors -----------------


def test_scalar_and_tied_planes_reach_the_same_error(fitted_scalar):
    error = mean_squared_error(normal(200_000, 1, seed=100), fitted_scalar)
    fresh = normal(50_000, 4, seed=100)
    tied = fit(normal(20_000, 4, seed=1), lattice(4), rounds=20)
    assert 0.118 < error < 0.120
    assert 0.118 < mean_squared_error(fresh, tied) < 0.120
    assert abs(mean_squared_error(fresh, tied) - error) < 0.001


@pytest.mark.parametrize(
    "start", [torch.eye(4), 0.6 * D4, torch.randn(4, 4, generator=seeded(5))], ids=["cube", "D4", "random"]
)
def test_tied_planes_gain_nothing_because_their_best_map_is_nearly_orthogonal(start):
    tied = fit(normal(20_000, 4, seed=1), AffineCodebook(start, torch.zeros(4), 4), rounds=40)
    assert torch.linalg.cond(tied.A) < 1.3
    assert 0.118 < mean_squared_error(normal(50_000, 4, seed=100), tied) < 0.120


def test_an_orthogonal_map_is_scalar_rounding_in_a_turned_basis():
    Q = torch.linalg.qr(torch.randn(4, 4, generator=seeded(6), dtype=torch.float64)).Q.float()
    x = normal(500, 4, seed=16)
    index = AffineCodebook(0.9 * Q, torch.zeros(4), 4).encode(x)
    turned = scalar(0.9).encode((x @ Q).reshape(-1, 1))
    assert torch.equal(index, index_of(digits_of(turned, 1, 4).view(500, 4), 4))


def test_untied_planes_of_4_weights(planes_4):
    assert mean_squared_error(normal(100_000, 4, seed=101), planes_4) <= 0.102


def test_a_tight_frame_of_one_number_is_a_place_where_fits_end(planes_4):
    torch.testing.assert_close(FRAME.A @ FRAME.A.T, 1.125 * torch.eye(4))
    fresh = normal(100_000, 4, seed=101)
    error = mean_squared_error(fresh, FRAME)
    assert error <= 0.0985 < mean_squared_error(fresh, planes_4)
    assert mean_squared_error(fresh, fit(normal(30_000, 4, seed=2), FRAME, rounds=10)) > error - 0.0005


def test_a_free_table_of_4_weights(table, planes_4):
    fresh = normal(100_000, 4, seed=101)
    assert mean_squared_error(fresh, table) <= 0.099
    assert mean_squared_error(fresh, table) < mean_squared_error(fresh, planes_4)


def test_untied_planes_of_8_weights(planes_8):
    assert mean_squared_error(normal(25_000, 8, seed=102), planes_8) <= 0.0925


# Errors ------------------------------------------------------


def test_fit_refuses_vectors_of_another_size():
    with pytest.raises(ValueError, match=r"\[10, 3\]; the codebook wants \[N, 4\]: reshape"):
        fit(torch.zeros(10, 3), lattice(4), 1)
    with pytest.raises(ValueError, match=r"vectors are \[12\]"):
        fit(torch.zeros(12), lattice(4), 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_fit_refuses_what_is_not_finite(bad):
    x = torch.zeros(10, 4)
    x[3, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity. Check the weights"):
        fit(x, lattice(4), 1)


def test_table_start_wants_enough_vectors():
    with pytest.raises(ValueError, match="10 vectors for a table of 16. Give more or lower `size`"):
        table_start(torch.zeros(10, 2), 16, seeded(0))
