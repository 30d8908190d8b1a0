"""Windows, batches and samples are pieces of the text: against slices of a list, properties of an epoch, and errors.

pytest tests/harness/test_batches.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcqat_min.harness.batches import batches, sample_windows, windows


@given(st.integers(1, 60), st.integers(1, 20))
def test_windows_are_consecutive_pieces(length, window):
    ids = torch.arange(length)
    if length < window:
        with pytest.raises(ValueError, match="shorter window"):
            windows(ids, window)
        return
    expected = [list(range(i, i + window)) for i in range(0, length - window + 1, window)]
    assert windows(ids, window).tolist() == expected


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**31))
def test_an_epoch_shows_each_window_at_most_once(count, window, batch_size, seed):
    batch_size = min(batch_size, count)
    stream = batches(torch.arange(count * window), window, batch_size, torch.Generator().manual_seed(seed))
    for _ in range(3):
        epoch = torch.cat([next(stream) for _ in range(count // batch_size)])
        assert epoch.shape == (count // batch_size * batch_size, window)
        starts = epoch[:, 0].tolist()
        assert len(set(starts)) == len(starts) and all(start % window == 0 for start in starts)
        assert torch.equal(epoch, epoch[:, :1] + torch.arange(window))


def test_batches_follow_the_generator_and_reshuffle():
    ids = torch.arange(4000)
    streams = [batches(ids, 4, 1000, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    first, same, other = ([next(s), next(s)] for s in streams)
    assert all(map(torch.equal, first, same))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])  # a new order in the second epoch
    assert torch.equal(first[0].sort(dim=0).values, first[1].sort(dim=0).values)  # of the same windows


def test_sampled_windows_are_distinct_windows_of_the_text():
    ids = torch.arange(1003)
    sample = sample_windows(ids, 30, 10, torch.Generator().manual_seed(1))
    allowed = {tuple(row) for row in windows(ids, 10).tolist()}
    drawn = {tuple(row) for row in sample.tolist()}
    assert len(drawn) == 30 and drawn <= allowed
    assert torch.equal(sample, sample_windows(ids, 30, 10, torch.Generator().manual_seed(1)))
    assert not torch.equal(sample, sample_windows(ids, 30, 10, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("ids, window", [(torch.arange(5), 6), (torch.arange(5), 0), (torch.ones(4, 4), 2)])
def test_ids_that_give_no_window(ids, window):
    with pytest.raises(ValueError, match="1-D ids"):
        windows(ids, window)


@pytest.mark.parametrize("count", [0, 4])
def test_more_windows_than_the_text_holds(count):
    ids, generator = torch.arange(30), torch.Generator()
    with pytest.raises(ValueError, match="holds 3 windows of 10 tokens"):
        batches(ids, 10, count, generator)  # at the call, not at the first next()
    with pytest.raises(ValueError, match="holds 3 windows of 10 tokens"):
        sample_windows(ids, count, 10, generator)
