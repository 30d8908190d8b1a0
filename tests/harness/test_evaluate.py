"""Perplexity and KL against values computed by hand, and against loops that score one token at a time.

Checked: the value on a three-token table; strides and bos against a separate forward pass for each token;
bounds that hold for all inputs; independence of batch and slice size; modes restored; error messages.
"""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lcqat_min.harness import evaluate
from lcqat_min.harness.evaluate import Perplexity, kl_to, perplexity


class Table(nn.Module):
    """A bigram model: the logits after token v are row v of a fixed table."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.table[input_ids])


def log_probabilities(model: nn.Module, context: torch.Tensor) -> torch.Tensor:
    """float64 [V]: what the model says comes after `context`, by a pass of its own."""
    with torch.no_grad():
        return model(input_ids=context[None], use_cache=False).logits[0, -1].double().log_softmax(-1)


def one_token_at_a_time(model: nn.Module, ids: torch.Tensor, window: int, stride: int, bos: int | None) -> list[float]:
    """The definition for stride < window: each token once, from the first window that holds it."""
    before = ids[:0] if bos is None else torch.tensor([bos])
    nll = []
    for t in range(len(ids)):
        moves = max(0, math.ceil((t + 1 - window) / stride))
        begin = min(moves * stride, len(ids) - window)
        context = torch.cat([before, ids[begin:t]])
        if len(context):
            nll.append(-log_probabilities(model, context)[ids[t]].item())
    return nll


@pytest.fixture
def ids(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(97, (23,), generator=generator)


def test_value_computed_by_hand():
    # p(1 after 0) = 1/2, p(2 after 1) = 1/4: nll = (ln 2 + ln 4) / 2, perplexity = sqrt(8)
    table = torch.tensor([[1 / 4, 1 / 2, 1 / 4], [1 / 2, 1 / 4, 1 / 4], [1 / 3, 1 / 3, 1 / 3]]).log()
    result = perplexity(Table(table), torch.tensor([0, 1, 2]), window=3)
    assert result.value == pytest.approx(math.sqrt(8), rel=1e-6)
    assert result.nll == pytest.approx(1.5 * math.log(2), rel=1e-6)
    assert (result.tokens, result.window, result.stride, result.bos) == (2, 3, 3, None)
    # with 2 before the text, p(0 after 2) = 1/3 counts as well: 2 * 4 * 3 = 24 over three tokens
    with_bos = perplexity(Table(table), torch.tensor([0, 1, 2]), window=3, bos=2)
    assert with_bos.value == pytest.approx(24 ** (1 / 3))
    assert with_bos.tokens == 3


def test_result_prints_all_that_defines_it():
    text = str(Perplexity(value=26.0123, nll=3.25857, tokens=12345, window=256, stride=64, bos=0))
    assert text == "perplexity 26.01 (3.2586 nats per token, 12345 tokens scored; window 256, stride 64, bos 0)"


@pytest.mark.parametrize("bos", [None, 5])
@pytest.mark.parametrize("stride", [1, 2, 3, 5, 7])
def test_strides_agree_with_one_token_at_a_time(tiny_llama, ids, stride, bos):
    model = tiny_llama()
    expected = one_token_at_a_time(model, ids, 8, stride, bos)
    result = perplexity(model, ids, window=8, stride=stride, bos=bos, batch_size=3)
    assert result.tokens == len(expected) == len(ids) - (bos is None)
    assert result.nll == pytest.approx(sum(expected) / len(expected), abs=1e-5)


@pytest.mark.parametrize("bos", [None, 5])
def test_papers_protocol_scores_whole_windows_only(tiny_gpt2, ids, bos):
    model = tiny_gpt2()
    before = ids[:0] if bos is None else torch.tensor([bos])
    expected = []
    for window in (ids[:8], ids[8:16]):  # 23 tokens: the last 7 are dropped
        for t in range(bos is None, 8):
            expected.append(-log_probabilities(model, torch.cat([before, window[:t]]))[window[t]].item())
    result = perplexity(model, ids, window=8, bos=bos)
    assert result.tokens == len(expected)
    assert result.nll == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert perplexity(model, ids, window=8, stride=8, bos=bos) == result


@given(st.integers(2, 200), st.integers(2, 12), st.data())
def test_uniform_guessing_has_the_perplexity_of_the_vocabulary(vocabulary, window, data):
    ids = torch.tensor(data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=window, max_size=40)))
    stride = data.draw(st.integers(1, window))
    constant = data.draw(st.floats(-50, 50))
    model = Table(torch.full((vocabulary, vocabulary), constant))
    assert perplexity(model, ids, window, stride).value == pytest.approx(vocabulary, rel=1e-5)


@given(st.integers(0, 2**31), st.integers(2, 30), st.floats(0, 20))
def test_kl_is_zero_for_itself_and_never_negative(seed, vocabulary, scale):
    draw = torch.Generator().manual_seed(seed)
    p, q = (Table(scale * torch.randn(vocabulary, vocabulary, generator=draw)) for _ in range(2))
    ids = torch.randint(vocabulary, (12,), generator=draw)
    assert kl_to(p, p, ids, window=5) == 0
    assert kl_to(p, q, ids, window=5) >= -1e-6


def test_kl_agrees_with_a_double_loop(tiny_llama, tiny_gpt2, ids):
    teacher, model = tiny_llama(seed=1), tiny_gpt2(seed=2)
    terms = []
    for window in (ids[:8], ids[8:16]):
        for t in range(8):
            log_p, log_q = (log_probabilities(m, window[: t + 1]) for m in (teacher, model))
            terms.append(sum(p.exp() * (p - q) for p, q in zip(log_p, log_q, strict=True)).item())
    assert kl_to(teacher, model, ids, window=8) == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert kl_to(model, teacher, ids, window=8) != pytest.approx(sum(terms) / len(terms), rel=1e-2)


def test_batches_and_slices_do_not_change_the_result(tiny_llama, ids, monkeypatch):
    teacher, model = tiny_llama(seed=1), tiny_llama(seed=2)
    whole = perplexity(model, ids, 8, 3, batch_size=8).nll, kl_to(teacher, model, ids, 8, batch_size=8)
    monkeypatch.setattr(evaluate, "SLICE_ELEMENTS", 5 * 97)  # five rows of logits at a time
    parts = perplexity(model, ids, 8, 3, batch_size=1).nll, kl_to(teacher, model, ids, 8, batch_size=1)
    assert parts == pytest.approx(whole, rel=1e-6)


def test_half_precision_logits_are_scored_in_float32():
    table = torch.randn(50, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.arange(50)
    half, full = Table(table), Table(table.float())
    assert perplexity(half, ids, 10).nll == perplexity(full, ids, 10).nll
    assert kl_to(half, Table(table.flip(0)), ids, 10) == kl_to(full, Table(table.float().flip(0)), ids, 10)


def test_hopeless_model_has_infinite_perplexity_not_an_exception():
    table = torch.tensor([[0.0, -1e4], [0.0, -1e4]])
    assert perplexity(Table(table), torch.tensor([0, 1, 1]), window=3).value == math.inf


def test_every_module_gets_its_own_mode_back(ids):
    layers = nn.Sequential(nn.Embedding(97, 97), nn.Dropout(0.5))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=self.layers(input_ids))

    model = Model().train()
    layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert perplexity(model, ids, 8) == perplexity(model, ids, 8)  # dropout is off while scoring
    assert kl_to(model, model, ids, 8) == 0
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(IndexError):
        perplexity(model, ids + 97, 8)  # token ids the model does not know
    assert [module.training for module in model.modules()] == modes


def test_without_tqdm_there_is_no_bar(ids, monkeypatch):
    model = Table(torch.randn(97, 97, generator=torch.Generator().manual_seed(0)))
    expected = perplexity(model, ids, 8), kl_to(model, model, ids, 8)
    monkeypatch.setitem(sys.modules, "tqdm", None)  # importing it now raises ImportError
    assert (perplexity(model, ids, 8), kl_to(model, model, ids, 8)) == expected


class Merging(Table):
    """Adds something to its table for evaluation and takes it off again for training, as some adapters do."""

    def train(self, mode: bool = True) -> nn.Module:
        self.table += (self.training and not mode) - (mode and not self.training)
        return super().train(mode)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_does_more_when_its_mode_changes_is_told(ids, training):
    model = Merging(torch.zeros(97, 97)).train(training)
    before = model.table.clone()
    perplexity(model, ids, 8)
    assert torch.equal(model.table, before) and model.training is training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": torch.arange(5)}, r"5 tokens, less than one window of 8: .* window of at most 5"),
        ({"ids": torch.zeros(0, dtype=torch.long)}, "0 tokens"),
        ({"ids": torch.zeros(2, 9, dtype=torch.long)}, r"shape \[T\], got torch.int64 of shape \[2, 9\]"),
        ({"ids": torch.zeros(9)}, "must be integers"),
        ({"stride": 0}, r"stride must be 1 \.\.\. window \(8\) .* got 0"),
        ({"stride": 9}, "got 9"),
        ({"window": 1}, "window must be at least 2 to score a token, got 1"),
        ({"window": 0, "bos": 3}, "window must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_errors_say_what_to_do(arguments, message):
    model = Table(torch.zeros(9, 9))
    with pytest.raises(ValueError, match=message):
        perplexity(model, **{"ids": torch.arange(9), "window": 8} | arguments)


def test_kl_needs_one_vocabulary():
    message = "teacher has a vocabulary of 9 tokens, the model of 11: .* share a tokenizer"
    with pytest.raises(ValueError, match=message):
        kl_to(Table(torch.zeros(9, 9)), Table(torch.zeros(11, 11)), torch.arange(8), window=4)
