"""Rounding to a trellis: against all bit strings, against the search by its definition, and against plain decisions."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcqat_min.codebook import AffineCodebook
from lcqat_min.codebook.trellis import TrellisCodebook
from lcqat_min.codebook.trellis_taps import TAPS
from lcqat_min.errors import UsageError
from lcqat_min.ptq import factorize, proxy_loss, viterbi
from lcqat_min.ptq.ldlq import feedback_of, ldlq_round
from lcqat_min.ptq.trellis import Trellis
from lcqat_min.ptq.viterbi import plain_decisions, viterbi_round


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_trellis(m: int, d: int, reach: int, seed: int = 0) -> TrellisCodebook:
    return TrellisCodebook(torch.randn(reach + 1, d, m, generator=seeded(seed)) * 0.6)


def moments_of(n: int, seed: int = 0, tokens: int = 64) -> Tensor:
    X = torch.randn(tokens, n, generator=seeded(seed), dtype=torch.float64)
    X[:, 1:] += 0.7 * X[:, :-1]
    return X.T @ X / tokens


@pytest.mark.parametrize(
    ("m", "d", "reach", "groups"), [(2, 1, 2, 5), (1, 1, 3, 9), (3, 2, 1, 3), (2, 1, 0, 4), (4, 1, 1, 3)]
)
def test_without_feedback_no_bit_string_is_better(m, d, reach, groups):
    book = a_trellis(m, d, reach)
    W = torch.randn(6, groups * d, generator=seeded(1))
    index, target = viterbi_round(W, torch.ones(6), book, None)
    strings = torch.tensor(list(itertools.product(range(1 << m), repeat=groups)))
    errors = (book.decode(strings).flatten(1)[:, None] - W).square().sum(2)  # [strings, rows]
    found = (book.decode(index).flatten(1) - W).square().sum(1)
    torch.testing.assert_close(found, errors.amin(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(target, W, rtol=1e-5, atol=1e-5)


def slow_viterbi(W: Tensor, book: TrellisCodebook, C: Tensor) -> list[list[int]]:
    """By its definition, in float64 and with one dict per vector: state -> cost, bits and errors of the best path."""
    d, groups = book.dim, W.shape[1] // book.dim
    L, metrics = (x.double() for x in feedback_of(C, d))
    rows = []
    for w in W.double():
        paths = {(): (0.0, [], torch.zeros_like(w))}
        for g in range(groups - 1, -1, -1):
            here, later, found = slice(g * d, (g + 1) * d), slice((g + 1) * d, None), {}
            for state, (cost, bits, error) in paths.items():
                t = w[here] + L[here, later] @ error[later]
                for own in range(1 << book.bits):
                    window = [own, *state]
                    value = sum(
                        book.taps[i].double() @ book.digits(torch.tensor(c)).double() for i, c in enumerate(window)
                    )
                    total = cost + (metrics[g].T @ (t - value)).square().sum().item()
                    new = tuple(window[: book.reach])
                    if new not in found or total < found[new][0]:
                        left = error.clone()
                        left[here] = w[here] - value
                        found[new] = total, [own, *bits], left
            paths = found
        rows.append(min(paths.values(), key=lambda path: path[0])[1])
    return rows


@pytest.mark.parametrize(("m", "d", "reach"), [(2, 1, 1), (2, 1, 2), (3, 2, 1), (1, 1, 3)])
def test_with_feedback_it_is_the_search_by_its_definition(m, d, reach):
    book, n = a_trellis(m, d, reach), 10 * d
    factor = factorize(moments_of(n))
    W = torch.randn(4, n, generator=seeded(2))
    scale = torch.tensor([0.5, 1.0, 1.5, 2.0])
    index, target = viterbi_round(W, scale, book, factor)
    assert index.tolist() == slow_viterbi(W / scale[:, None], book, factor.C)
    L, _ = feedback_of(factor.C, d)
    error = W / scale[:, None] - book.decode(index).flatten(1)
    torch.testing.assert_close(target, book.decode(index).flatten(1) + error @ L.T, rtol=1e-4, atol=1e-4)


def test_late_decisions_cost_little(monkeypatch):
    """Deciding after 48 vectors loses less than half a percent against deciding at the end of the row."""
    book, W = TrellisCodebook(torch.tensor(TAPS[2, 1, 3])), torch.randn(64, 200, generator=seeded(3))
    factor, losses = factorize(moments_of(200, tokens=800)), []
    for undecided in (6, 1000):
        monkeypatch.setattr(viterbi, "UNDECIDED", undecided)
        index, _ = viterbi_round(W, torch.ones(64), book, factor)
        losses.append(proxy_loss(book.decode(index).flatten(1) - W, factor.H).sum().item())
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_rows_are_independent_of_each_other_and_of_the_chunks(monkeypatch):
    book, factor = a_trellis(2, 1, 2), factorize(moments_of(40))
    W, scale = torch.randn(9, 40, generator=seeded(4)), torch.rand(9, generator=seeded(5)) + 0.5
    whole, _ = viterbi_round(W, scale, book, factor)
    assert torch.equal(whole, viterbi_round(W.clone(), scale, book, factor)[0])  # and it repeats itself
    monkeypatch.setattr(viterbi, "STATES", {"cpu": 64})  # four rows at a time
    parts, _ = viterbi_round(W, scale, book, factor)
    assert (parts == whole).float().mean() > 0.99  # products of other shapes may add in another order
    part, _ = viterbi_round(W[[7, 2]], scale[[7, 2]], book, factor)
    assert (part == whole[[7, 2]]).float().mean() > 0.99


@settings(max_examples=25)
@given(
    n=st.integers(1, 40), rows=st.integers(1, 5), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-12, 1.0, 1e6])
)
def test_the_method_never_loses_to_plain_decisions(n, rows, seed, scale):
    W, factor = scale * torch.randn(rows, n, generator=seeded(seed)), factorize(moments_of(n, seed))
    method = Trellis(reach=1)
    best = method.round_rows(W, factor, method.start_taps())
    book = best.coded.codebook
    index, _ = plain_decisions(W, best.coded.scale, book, factor)
    plain = proxy_loss(book.decode(index).flatten(1) * best.coded.scale[:, None] - W, factor.H)
    assert (best.loss <= plain * (1 + 1e-6)).all()
    torch.testing.assert_close(best.loss, proxy_loss(best.coded.weight() - W, factor.H))


def test_plain_decisions_of_a_trellis_without_reach_are_ldlq():
    taps = torch.tensor(TAPS[2, 1, 0])
    grid, book = AffineCodebook(taps[0], torch.zeros(1), 2), TrellisCodebook(taps)
    W, factor = torch.randn(5, 30, generator=seeded(6)), factorize(moments_of(30))
    index, target = plain_decisions(W, torch.ones(5), book, factor)
    expected, expected_target = ldlq_round(W, torch.ones(5), grid, factor)
    assert torch.equal(index, expected)
    torch.testing.assert_close(target, expected_target, rtol=1e-5, atol=1e-5)
    assert torch.equal(plain_decisions(W, torch.ones(5), book, None)[0], viterbi_round(W, torch.ones(5), book, None)[0])


def test_looking_ahead_pays():
    book, W = TrellisCodebook(torch.tensor(TAPS[2, 1, 2])), torch.randn(40, 128, generator=seeded(7))
    factor = factorize(moments_of(128, tokens=512))
    losses = []
    for way in (viterbi_round, plain_decisions):
        index, _ = way(W, torch.ones(40), book, factor)
        losses.append(proxy_loss(book.decode(index).flatten(1) - W, factor.H).sum())
    assert losses[0] < 0.8 * losses[1]


def test_threads_change_nothing_and_stay_as_they_were(monkeypatch):
    book, factor = a_trellis(2, 1, 2), factorize(moments_of(40))
    W = torch.randn(9, 40, generator=seeded(8))
    monkeypatch.setattr(viterbi, "STATES", {"cpu": 64})  # four rows at a time
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(viterbi_round(W, torch.ones(9), book, factor))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_memory_does_not_grow_with_the_rows():
    """The largest tensors of a chunk; another chunk takes the same."""
    book = TrellisCodebook(torch.tensor(TAPS[2, 1, 3]))
    search = viterbi._Search(book, 256, torch.eye(64), torch.ones(64, 1, 1))
    kept = sum(x.numel() * x.element_size() for x in (search.total, search.difference, search.kept, search.carried))
    assert kept < 16 << 20 and viterbi.STATES["cpu"] == 64 * 256


WRONG = [{"bits": 1.25}, {"bits": 0}, {"bits": 2.0, "reach": 9}, {"sweeps": 6}, {"estimator": "none"}]


@pytest.mark.parametrize("wrong", WRONG)
def test_settings_that_do_not_exist_are_named(wrong):
    with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
        Trellis(**wrong)


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.5, 3, 4])
def test_every_rate_has_taps(bits):
    book = Trellis(bits=bits).start_taps()
    assert book.bits / book.dim == bits and 1 << book.bits * book.reach <= 64
