"""Sweeps: against trying every codeword, never worse, and a fixed point."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcqat_min.codebook import AffineCodebook, Codebook, TableCodebook, lattice, random_planes, scalar
from lcqat_min.ptq import Rounded, factorize, proxy_loss, round_matrix, row_scales
from lcqat_min.ptq.sweeps import swept


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_codebook(kind: str) -> Codebook:
    g = seeded(0)
    return {
        "scalar": scalar(0.9),
        "lattice": lattice(2),
        "planes": random_planes(4, g),
        "three bits": AffineCodebook(torch.tensor([[1.0, 0.5, 0.25]]), torch.zeros(1), 2),
        "table": TableCodebook(torch.randn(16, 2, generator=g)),
    }[kind]


KINDS = ("scalar", "lattice", "planes", "three bits", "table")


def a_case(kind: str, rows: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Rounded]:
    X = torch.randn(4 * n, n, generator=seeded(seed), dtype=torch.float64)
    X[:, 1:] += 0.9 * X[:, :-1]
    factor, W = factorize(X.T @ X / len(X)), torch.randn(rows, n, generator=seeded(seed + 1))
    return W, factor.H, round_matrix(W, factor, a_codebook(kind), row_scales(W, [0.8, 1.0]))


def slow_sweep(W: Tensor, rounded: Rounded, H: Tensor) -> Tensor:
    """One sweep, float64: each vector takes the codeword with which the loss of its row is least."""
    coded, H = rounded.coded, H.double()
    words, index = coded.codebook.codewords().double(), coded.index.clone()
    for row, (weights, scale) in enumerate(zip(W.double(), coded.scale.double(), strict=True)):
        for g in range(index.shape[1]):
            losses = []
            for candidate in range(len(words)):
                index[row, g] = candidate
                e = words[index[row]].flatten() * scale - weights
                losses.append(e @ H @ e)
            index[row, g] = torch.stack(losses).argmin()
    return index


@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_tries_every_codeword_of_every_vector(kind):
    W, H, rounded = a_case(kind, rows=3, n=16)
    found = swept(W, rounded, H, sweeps=1)
    assert torch.equal(found.coded.index, slow_sweep(W, rounded, H))
    assert not torch.equal(found.coded.index, rounded.coded.index)
    torch.testing.assert_close(found.loss, proxy_loss(found.coded.weight() - W, H))


@settings(max_examples=20)
@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31))
def test_no_row_gets_worse_and_the_end_is_a_fixed_point(kind, rows, vectors, seed):
    W, H, rounded = a_case(kind, rows, vectors * a_codebook(kind).dim, seed)
    found = swept(W, rounded, H, sweeps=30)
    assert (found.loss <= rounded.loss * (1 + 1e-5)).all()
    again = swept(W, found, H, sweeps=1)
    assert (again.coded.index == found.coded.index).float().mean() > 0.98  # but for near ties
    assert torch.equal(rounded.coded.scale, found.coded.scale)


def test_targets_are_what_each_vector_should_be_with_all_others_fixed():
    W, H, rounded = a_case("scalar", rows=2, n=12)
    found = swept(W, rounded, H, sweeps=30)
    E, H = (W / found.coded.scale[:, None] - found.coded.weight() / found.coded.scale[:, None]).double(), H.double()
    for k in range(12):
        others = E @ H[:, k] - E[:, k] * H[k, k]
        expected = W[:, k] / found.coded.scale + others / H[k, k]
        torch.testing.assert_close(found.target[:, k].double(), expected, rtol=1e-4, atol=1e-4)


def test_zero_sweeps_change_nothing_and_chunks_of_rows_do_not_matter(monkeypatch):
    from lcqat_min.ptq import sweeps

    W, H, rounded = a_case("planes", rows=6, n=16)
    assert torch.equal(swept(W, rounded, H, 0).coded.index, rounded.coded.index)
    whole = swept(W, rounded, H, 4)
    monkeypatch.setattr(sweeps, "TALL_ELEMENTS", 40)
    assert (swept(W, rounded, H, 4).coded.index == whole.coded.index).float().mean() > 0.98
