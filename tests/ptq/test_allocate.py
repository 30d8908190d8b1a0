"""Bits for layers: the published example, the best of all choices, and a budget that is never exceeded."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinds import method
from transformers import LlamaConfig, LlamaForCausalLM

from lcqat_min.errors import UsageError
from lcqat_min.layer.linear import quant_layers
from lcqat_min.ptq import quantize
from lcqat_min.ptq.allocate import RATES, allocate, spent


def test_the_example_of_baq():
    """arXiv 2506.05664: gains 16, 1, 1, 1/16 at 2 bits on average."""
    gains = {"a": 16.0, "b": 1.0, "c": 1.0, "d": 1 / 16}
    assert spent(gains, dict.fromkeys(gains, 100), 2.0, rates=(0, 1, 2, 3, 4)) == {"a": 4, "b": 2, "c": 2, "d": 0}


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=4), st.floats(1.0, 4.0))
def test_layers_of_one_size_get_nearly_the_best_of_all_choices(exponents, budget):
    gains = {str(i): 2.0**e for i, e in enumerate(exponents)}
    sizes = dict.fromkeys(gains, 10)
    loss = lambda rates: sum(gain * 4.0**-rate for gain, rate in zip(gains.values(), rates, strict=True))  # noqa: E731
    choices = [c for c in itertools.product(RATES, repeat=len(gains)) if sum(c) <= budget * len(gains)]
    found = spent(gains, sizes, budget)
    assert sum(found.values()) <= budget * len(gains) + 1e-9
    less = [c for c in choices if sum(c) <= budget * len(gains) - 1]  # the last step may not fit
    assert loss(found.values()) <= min(map(loss, less or [[1.0] * len(gains)])) * (1 + 1e-9)


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 10**6)), min_size=1, max_size=20), st.floats(1.0, 5.0))
def test_a_budget_is_never_exceeded(layers, budget):
    gains, sizes = ({str(i): layer[j] for i, layer in enumerate(layers)} for j in (0, 1))
    found = spent(gains, sizes, budget)
    assert sum(found[name] * size for name, size in sizes.items()) <= budget * sum(sizes.values()) * (1 + 1e-12)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes))


TOKENS = torch.arange(48).view(2, 24) % 97


def test_a_model_gets_rates_and_uses_them(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    rates = allocate(model, [TOKENS], 2.25)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert rates == allocate(model, [TOKENS], 2.25)
    assert set(rates) == {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)} - {
        "lm_head"
    }
    quantize(
        model, [TOKENS], method("trellis", reach=-1), changes={name: {"bits": rate} for name, rate in rates.items()}
    )
    layers = dict(quant_layers(model))
    for name, rate in rates.items():
        book = layers[name].codebook()
        assert book.bits / book.dim == rate
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    codes = sum(rates[name] * layer.in_features * layer.out_features for name, layer in layers.items())
    assert codes <= 2.25 * weights


def test_changes_by_part_of_a_name(model):
    quantize(
        model, [TOKENS], method("trellis"), changes={"down_proj": {"bits": 3.0}, "q_proj": {"learn_codebook": False}}
    )
    for name, layer in quant_layers(model):
        assert layer.codebook().bits == (3 if "down_proj" in name else 2)
        assert layer.taps.requires_grad == ("q_proj" not in name)


def test_a_wrong_change_is_named_before_anything_happens(model):
    for changes, said in (
        ({"dwn": {"bits": 3}}, "dwn"),
        ({"down": {"colour": 3}}, "colour"),
        ({"down": {"bits": 7}}, "7"),
    ):
        with pytest.raises(UsageError, match=said):
            quantize(model, [TOKENS], method("trellis"), changes=changes)
        assert not quant_layers(model)
    with pytest.raises(UsageError, match="bits cannot differ"):
        quantize(model, [TOKENS], method("table", dim=1), changes={"down": {"bits": 3.0}})


def test_a_budget_below_the_lowest_rate_is_refused():
    with pytest.raises(UsageError, match="0.5"):
        spent({"a": 1.0}, {"a": 1}, 0.5)


def test_layers_that_matter_more_get_more(model):
    """A layer whose output is multiplied by almost zero hardly changes the predictions."""
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-4)
    rates = allocate(model, [TOKENS], 2.0)
    quiet = [rates[f"model.layers.1.mlp.{name}"] for name in ("gate_proj", "up_proj", "down_proj")]
    assert max(quiet) == 1.5 and max(rates.values()) > 2
    assert min(allocate(model, [TOKENS], 1.25).values()) == 1.0
    with pytest.raises(UsageError, match="0.75"):
        allocate(model, [TOKENS], 0.75)


def test_conv1d_is_put_back_as_it_was(tiny_gpt2):
    model = tiny_gpt2()
    before = {name: p.clone() for name, p in model.named_parameters()}
    rates = allocate(model, [TOKENS], 2.0)
    assert "transformer.h.0.attn.c_proj" in rates
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
