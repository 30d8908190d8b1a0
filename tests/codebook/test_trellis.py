"""The linear trellis against its formula in loops, the banded matrix, and the errors that its tables promise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lcqat_min.codebook import fit, mean_squared_error, pack_bits, scalar
from lcqat_min.codebook.digits import digits_of
from lcqat_min.codebook.trellis import SPAN, TrellisCodebook, banded, filtered
from lcqat_min.codebook.trellis_taps import TAPS
from lcqat_min.ptq.viterbi import viterbi_round


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_trellis(m: int, d: int, reach: int, seed: int = 0) -> TrellisCodebook:
    return TrellisCodebook(torch.randn(reach + 1, d, m, generator=seeded(seed)))


def known(m: int, d: int, reach: int) -> TrellisCodebook:
    return TrellisCodebook(torch.tensor(TAPS[m, d, reach]))


def by_loops(book: TrellisCodebook, index: Tensor) -> Tensor:
    """float64 [rows, n/d, d]: the sum of the module's first line, term by term."""
    c, taps = digits_of(index, book.bits, 2).double(), book.taps.double()
    w = torch.zeros(*index.shape, book.dim, dtype=torch.float64)
    for g in range(index.shape[1]):
        for ahead in range(book.reach + 1):
            if g + ahead < index.shape[1]:
                w[:, g] += c[:, g + ahead] @ taps[ahead].T
    return w


shapes = given(
    m=st.integers(1, 5),
    d=st.integers(1, 3),
    reach=st.integers(0, 4),
    groups=st.sampled_from([1, 2, 5, SPAN - 1, SPAN, 2 * SPAN + 3]),
    seed=st.integers(0, 2**31),
)


@shapes
def test_decoding_is_the_sum_over_taps(m, d, reach, groups, seed):
    book = a_trellis(m, d, reach, seed)
    index = torch.randint(1 << m, (3, groups), generator=seeded(seed))
    expected = by_loops(book, index)
    torch.testing.assert_close(book.decode(index).double(), expected, rtol=1e-5, atol=1e-5)
    wide = book.taps.transpose(0, 1).flatten(1)  # [A_0 | A_1 | ...]
    torch.testing.assert_close((book.features(index) @ wide.T).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(book.with_map(wide).taps, book.taps, rtol=0, atol=0)


@shapes
def test_a_row_is_one_vector_of_a_banded_affine_codebook(m, d, reach, groups, seed):
    book = a_trellis(m, d, reach, seed)
    index = torch.randint(1 << m, (2, groups), generator=seeded(seed))
    A = banded(book.taps, groups)[: groups * m].T  # behind the row there are no digits
    assert A.shape == (groups * d, groups * m)
    torch.testing.assert_close(book.decode(index).flatten(1), book.digits(index).flatten(1) @ A.T, rtol=1e-5, atol=1e-5)
    h = torch.randn(4, groups * d, generator=seeded(seed))
    folded, planes = book.linear_form(h)
    torch.testing.assert_close(folded, h @ A, rtol=1e-4, atol=1e-4)
    assert planes.bits == planes.dim == 1 and planes.codewords().flatten().tolist() == [-1, 1]


def test_gradients_are_those_of_the_sum():
    taps = torch.randn(3, 2, 3, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    c = torch.randn(2, SPAN + 3, 3, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(filtered, (c, taps))


def test_the_state_and_the_end_of_a_row_by_hand():
    book = TrellisCodebook(torch.tensor([[[1.0, 0.5]], [[0.25, 0.125]]]))  # m = 2, d = 1, reach 1
    assert book.decode(torch.tensor([[3, 0]])).flatten().tolist() == [1.5 - 0.375, -1.5]
    assert book.window_values(1).flatten().tolist() == [-0.375, -0.125, 0.125, 0.375]
    assert book.window_values(0).flatten().tolist() == [0, 0, 0, 0]
    assert book.row_end(8).flatten().tolist() == [0.375]  # as if two bits of -1 were taken away
    assert (book.dim, book.bits, book.reach, book.numbers()) == (1, 2, 1, 4)


def test_solving_for_the_taps_is_least_squares():
    book, index = a_trellis(2, 1, 2), torch.randint(4, (6, 50), generator=seeded(1))
    x = torch.randn(6 * 50, 1, generator=seeded(2))
    expected = torch.linalg.lstsq(book.features(index).flatten(0, 1).double(), x.double()).solution
    found = book.solved(x, index).taps.transpose(0, 1).flatten(1).T
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_reach_it_is_the_untied_scalar_grid():
    """Lloyd and Max's quantizer of four levels for N(0, 1): 0.117482 (field standard)."""
    levels = [0.4528, 1.5104]
    book = known(2, 1, 0)
    assert sorted(book.decode(torch.arange(4)[:, None]).abs().flatten().tolist())[::2] == pytest.approx(
        levels, abs=3e-3
    )
    points = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-(points**2) / 2) * (points[1] - points[0]) / (2 * torch.pi) ** 0.5
    words = torch.tensor([0.98160 + 0.52882, 0.98160 - 0.52882], dtype=torch.float64)
    words = torch.cat([words, -words])
    error = ((points[:, None] - words).square().amin(1) * density).sum().item()
    assert error == pytest.approx(0.117482, abs=1e-6)
    own = torch.tensor(sorted(book.decode(torch.arange(4)[:, None]).flatten().tolist()), dtype=torch.float64)
    assert ((points[:, None] - own).square().amin(1) * density).sum().item() == pytest.approx(0.117482, abs=1e-4)


BARS = {  # the errors that codebook/trellis.py and trellis_taps.py promise, inner columns
    (2, 1, 1): 0.096,
    (2, 1, 2): 0.0865,
    (2, 1, 3): 0.082,
    (2, 1, 4): 0.078,
    (3, 1, 2): 0.0235,
}


@pytest.fixture(scope="module")
def errors() -> dict[tuple[int, int, int], float]:
    x = torch.randn(192, 240, generator=seeded(5))
    x /= x.square().mean().sqrt()
    found = {}
    for key in TAPS:
        if key[0] * key[2] > 6 and key not in BARS:  # hundreds of states: seconds each
            continue
        rows = x[: 96 if key[0] * key[2] > 6 else 192]
        rows = rows / rows.square().mean().sqrt()
        index, _ = viterbi_round(rows, torch.ones(len(rows)), known(*key), None)
        found[key] = (known(*key).decode(index).flatten(1) - rows)[:, :-32].square().mean().item()
    return found


@pytest.mark.parametrize("key", BARS)
def test_errors_on_normal_weights(key, errors):
    assert 2.0 ** (-2 * key[0] / key[1]) < errors[key] < BARS[key] + 0.0008  # a sample of 20 000 to 40 000 weights


def test_more_reach_is_better_and_one_bit_gains_nothing(errors):
    assert errors[2, 1, 0] > errors[2, 1, 1] > errors[2, 1, 2] > errors[2, 1, 3] > errors[2, 1, 4]
    of_sign = 1 - 2 / torch.pi  # the best quantizer of one bit for one normal weight: 0.3634
    for reach in (3, 6):
        assert errors[1, 1, reach] > of_sign - 0.015
    grid = fit(torch.randn(20_000, 1, generator=seeded(0)), scalar(), rounds=10)
    assert errors[2, 1, 1] < 0.85 * mean_squared_error(torch.randn(20_000, 1, generator=seeded(1)), grid)


def test_packing_keeps_every_bit():
    index = torch.randint(8, (3, 11), generator=seeded(0))
    assert pack_bits(index, 3).shape == (3, 5)  # 33 bits
