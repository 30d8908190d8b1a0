"""Statistics of indices, against layers made by hand."""

import pytest
import torch

from lcqat_min.codebook import AffineCodebook, CodedMatrix
from lcqat_min.harness import code_stats, indices_of
from lcqat_min.layer.linear import AffineLinear
from lcqat_min.packing import pack_layers


def scalars(digits: list[int]) -> AffineLinear:
    """One row of weights on a grid of four levels."""
    book, n = AffineCodebook(torch.ones(1, 1), torch.zeros(1), 4), len(digits)
    return AffineLinear(CodedMatrix(book, torch.tensor([digits]), torch.ones(1)), n, None, (None, None))


def test_usage_entropy_and_flips_by_hand():
    layer = scalars([0, 1, 2, 3, 0, 0, 3, 3])
    stats = code_stats(layer)[""]
    assert stats.usage.tolist() == [3, 1, 1, 3] and stats.flips is None
    assert stats.entropy == pytest.approx(2 * 1 / 8 * 3 + 2 * 3 / 8 * (3 - 1.5849625), abs=1e-6)
    before = indices_of(layer)
    with torch.no_grad():
        layer.latent[0, 0] = 1.4
    for changed in (layer, pack_layers(layer)[""]):
        stats = code_stats(changed, before)[""]
        assert stats.usage.tolist() == [2, 2, 1, 3] and stats.flips == 1 / 8


def test_equal_use_has_all_the_entropy_and_a_single_codeword_none():
    assert code_stats(scalars([0, 1, 2, 3]))[""].entropy == 2.0
    assert code_stats(scalars([1, 1]))[""].entropy == 0.0


def test_a_snapshot_of_another_model_is_refused():
    layer = scalars([0, 1])
    for before in ({"another": indices_of(layer)[""]}, indices_of(scalars([0, 1, 2]))):
        with pytest.raises(ValueError, match="what indices_of returned"):
            code_stats(layer, before)
