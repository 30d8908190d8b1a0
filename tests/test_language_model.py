"""What a model reads: configurations inside configurations, offloaded weights, padded batches, models of other kinds.

Padded batches are checked against the same texts without padding: second moments, codes, losses and gradients.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from kinds import method
from torch import nn

from lcqat_min import TrainConfig, kl_to, perplexity, quantize, train
from lcqat_min.harness.batches import longest_window
from lcqat_min.language_model import input_device, read_batch, vocabulary, without_padding
from lcqat_min.layer.linear import quant_layers
from lcqat_min.ptq.model import linear_layers
from lcqat_min.ptq.moments import second_moments

SCALAR = method("scalar", rotate="none", refits=0)


class Net(nn.Module):
    """The smallest model that can be quantized; `forward` and `config` may be replaced."""

    def __init__(self, config: object = None) -> None:
        super().__init__()
        self.config, self.embed, self.linear = config, nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(self.embed(input_ids)))


class Config(SimpleNamespace):
    def get_text_config(self, decoder: bool = False) -> object:
        if isinstance(self.text_config, list):
            raise ValueError("Multiple valid text configs")
        return self.text_config or self


# --- vocabulary, window, device ------------------------------------------------------------------------------


def test_numbers_of_a_text_model_inside_another(tiny_llama, tiny_gpt2):
    inner = SimpleNamespace(vocab_size=11, n_ctx=64)
    for config, words, window in (
        (Config(text_config=inner, vocab_size=99, max_position_embeddings=7), 11, 64),
        (Config(text_config=None, vocab_size=11, max_seq_len=32), 11, 32),
        (Config(text_config=["two", "parts"], vocab_size=11, n_positions=5), 11, 5),
        ({"vocab_size": 11}, None, None),
        ("a name", None, None),
        (SimpleNamespace(vocab_size=None, n_positions=-1), None, None),
    ):
        assert (vocabulary(Net(config)), longest_window(Net(config))) == (words, window), config
    assert (vocabulary(tiny_llama()), longest_window(tiny_gpt2())) == (97, 256)


def test_embeddings_know_better_than_the_config(tiny_llama):
    model = tiny_llama()
    model.set_input_embeddings(nn.Embedding(104, 32))  # padded to a multiple of eight
    assert vocabulary(model) == 104 and model.config.vocab_size == 97
    read_batch(torch.tensor([[103, 0]]), model, "training")
    with pytest.raises(ValueError, match="a training batch holds tokens from 0 to 104, the model knows 0 to 103"):
        read_batch(torch.tensor([[104, 0]]), model, "training")


@pytest.mark.parametrize("where", ["calibration", "training", "text", "bos", "teacher"])
def test_tokens_that_a_model_inside_another_does_not_have_are_named(where):
    model = Net(Config(text_config=SimpleNamespace(vocab_size=11)))
    good, bad = torch.arange(10)[None], torch.arange(12)[None]
    teacher = copy.deepcopy(model)
    other = Net(Config(text_config=SimpleNamespace(vocab_size=10)))
    quantize(model, [good], SCALAR)
    calls = {
        "calibration": lambda: quantize(copy.deepcopy(teacher), [bad], SCALAR),
        "training": lambda: train(model, [bad], TrainConfig(1), teacher),
        "text": lambda: perplexity(model, bad[0], 4),
        "bos": lambda: perplexity(model, good[0], 4, bos=11),
        "teacher": lambda: kl_to(other, model, torch.arange(11), 4),
    }
    with pytest.raises(ValueError, match=r"holds tokens from .* to 1[01], the model knows 0 to (10|9): encode"):
        calls[where]()


def test_a_model_whose_weights_are_offloaded_scores_and_teaches(tiny_llama, tmp_path):
    from accelerate import disk_offload

    teacher, ids = tiny_llama().eval(), torch.randint(97, (64,), generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(teacher)
    quantize(model, [ids.view(2, 32)], SCALAR, skip=("layers.1", "lm_head"))
    other, losses = copy.deepcopy(model), []
    expected = perplexity(teacher, ids, 16), kl_to(teacher, model, ids, 16)
    train(model, [ids.view(2, 32)], TrainConfig(1), teacher, on_step=lambda step, loss: losses.append(loss))
    disk_offload(teacher, tmp_path, execution_device="cpu")
    assert next(teacher.parameters()).is_meta and input_device(teacher) == torch.device("cpu")
    assert (perplexity(teacher, ids, 16), kl_to(teacher, other, ids, 16)) == expected
    train(other, [ids.view(2, 32)], TrainConfig(1), teacher, on_step=lambda step, loss: losses.append(loss))
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"weight of 'model\.layers\.0.*' is not in memory .*offloaded"):
        quantize(teacher, [ids.view(2, 32)], SCALAR)


def test_weights_that_are_nowhere_are_named():
    model = Net().to("meta")
    with pytest.raises(ValueError, match="weights of Net are not in memory"):
        perplexity(model, torch.arange(11), 4)
    student = Net()
    quantize(student, [torch.arange(10)[None]], SCALAR)
    student.embed = student.embed.to("meta")
    with pytest.raises(ValueError, match="'embed.weight' is not in memory .*load the model whole to train it"):
        train(student, [torch.arange(10)[None]], TrainConfig(1), Net())


# --- padding -------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randint(97, (length,), generator=generator) for length in (12, 7, 12, 3)]


def padded(texts: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """What a tokenizer returns, with other tokens as padding than zeros."""
    ids, mask = torch.full((len(texts), 12), 5), torch.zeros(len(texts), 12, dtype=torch.long)
    for row, text in enumerate(texts):
        where = slice(len(text)) if side == "right" else slice(12 - len(text), 12)
        ids[row, where], mask[row, where] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_in_no_second_moment_and_no_code(tiny_gpt2, texts, side):
    config = method("scalar", refits=0)
    alone, batch, models = [text[None] for text in texts], padded(texts, side), [tiny_gpt2(), tiny_gpt2()]
    layers = dict(linear_layers(models[0]))
    expected = second_moments(models[0], layers, alone)
    found = second_moments(models[0], layers, without_padding(*read_batch(batch, models[0], "calibration")))
    for name, moments in expected.items():
        assert found[name].tokens == moments.tokens == 34
        torch.testing.assert_close(found[name].H, moments.H, rtol=1e-4, atol=1e-6)
    reports = [
        quantize(model, given, config, skip=("h.1.", "lm_head"))
        for model, given in zip(models, ([batch], alone), strict=True)
    ]
    assert [report.tokens for report in reports[0]] == [34] * 4 == [report.tokens for report in reports[1]]
    for (_, one), (_, other) in zip(*map(quant_layers, models), strict=True):
        assert (one.indices() == other.indices()).float().mean() > 0.99


def test_what_a_tokenizer_returns_is_a_batch(texts):
    from transformers import BatchEncoding

    ids, mask = read_batch(BatchEncoding(padded(texts, "right")), Net(), "training")
    assert torch.equal(mask.sum(1), torch.tensor([12, 7, 12, 3])) and mask.dtype == torch.bool
    assert read_batch({"input_ids": ids}, Net(), "training") == (ids, None)
    assert read_batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, Net(), "training") == (ids, None)
    parts = without_padding(ids, mask)
    assert [list(part.shape) for part in parts] == [[2, 12], [1, 7], [1, 3]]
    assert torch.equal(parts[0], torch.stack([texts[0], texts[2]])) and torch.equal(parts[1][0], texts[1])


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_in_no_training_step(tiny_llama, texts, side, taught):
    teacher = tiny_llama().eval()
    model = copy.deepcopy(teacher)
    quantize(model, [texts[0][None]], SCALAR, skip=("layers.1", "lm_head"))
    losses, steps = [], TrainConfig(1)
    for text in texts:  # each by itself: the loss of a step is that before the step
        train(
            copy.deepcopy(model),
            [text[None]],
            steps,
            teacher if taught else None,
            on_step=lambda step, loss: losses.append(loss),
        )
    counts = [len(text) - (not taught) for text in texts]
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    rows = train(model, [padded(texts, side)], steps, teacher if taught else None)
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-4) and rows[0]["tokens"] == 34


@pytest.mark.parametrize("mask", [torch.ones(2, 5), torch.zeros(2, 6), [[1] * 6] * 2])
def test_masks_that_do_not_fit_are_named(mask):
    with pytest.raises(ValueError, match=r"attention_mask of a calibration batch \[2, 6\] is .* must have that shape"):
        quantize(Net(), [{"input_ids": torch.arange(12).view(2, 6) % 11, "attention_mask": mask}], SCALAR)


def test_padding_without_a_mask_is_noticed():
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 0]])
    for config in (SimpleNamespace(pad_token_id=0, eos_token_id=1), SimpleNamespace(pad_token_id=0, eos_token_id=[1])):
        for batch in (ids, ids.flip(1)):
            with pytest.warns(RuntimeWarning, match="padding token 0, .*attention_mask"):
                quantize(Net(config), [batch], SCALAR)


@pytest.mark.filterwarnings("error")
def test_what_may_be_text_is_not_taken_for_padding():
    ids = torch.tensor([[1, 2, 3, 0], [1, 2, 0, 0]])
    for config in (None, SimpleNamespace(pad_token_id=None), SimpleNamespace(pad_token_id=0, eos_token_id=[3, 0])):
        quantize(Net(config), [ids], SCALAR)
    quantize(Net(SimpleNamespace(pad_token_id=0, eos_token_id=1)), [ids[:1], ids[1:, :1]], SCALAR)


# --- models of other kinds -----------------------------------------------------------------------------------


class Positional(Net):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embed(tokens))


class NoCacheArgument(Net):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embed(input_ids))


def calls(model: nn.Module) -> list:
    ids, student = torch.arange(10), Net()
    quantize(student, [ids[None]], SCALAR)
    return [
        lambda: quantize(model, [ids[None]], SCALAR),
        lambda: perplexity(model, ids, 5),
        lambda: kl_to(model, Net(), ids, 5),
        lambda: train(student, [ids[None]], TrainConfig(1), model),
    ]


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (Positional(), "forward of Positional takes tokens, not input_ids and use_cache: wrap it"),
        (NoCacheArgument(), "takes input_ids, not use_cache: wrap it"),
        (
            Net(SimpleNamespace(is_encoder_decoder=True)),
            "Net has an encoder and a decoder: give a causal language model",
        ),
    ],
)
def test_models_that_cannot_be_called_as_a_language_model_are_named(model, match):
    for call in calls(model):
        with pytest.raises(ValueError, match=match):
            call()
    assert isinstance(model.linear, nn.Linear)


class Headless(Net):
    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.linear(self.embed(input_ids)))


class Classifier(Net):
    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(self.embed(input_ids)).mean(1))


@pytest.mark.parametrize(
    ("kind", "match"),
    [(Headless, "SimpleNamespace, no logits for token ids"), (Classifier, r"logits \[., 11\] for token ids")],
)
def test_models_without_logits_for_each_token_are_named_when_these_are_needed(kind, match):
    for call in calls(kind())[1:]:
        with pytest.raises(ValueError, match=f"{kind.__name__} returns {match}.*AutoModelForCausalLM"):
            call()
    calls(kind())[0]()  # second moments do not need them


def test_a_teacher_that_shares_parameters_is_named():
    model, ids = Net(), torch.arange(10)[None]
    quantize(model, [ids], SCALAR)
    teacher = Net()
    teacher.embed = model.embed
    with pytest.raises(ValueError, match="teacher shares 'embed.weight' with the model: copy.deepcopy"):
        train(model, [ids], TrainConfig(1), teacher)
    model.embed.requires_grad_(False)
    train(model, [ids], TrainConfig(1), teacher)


def test_an_iterator_that_was_used_up_is_named():
    batches, teacher = iter([torch.arange(10)[None]]), Net()
    model = copy.deepcopy(teacher)
    quantize(model, batches, SCALAR)
    with pytest.raises(ValueError, match="ended after 0 of 1 steps: give more .*iterator"):
        train(model, batches, TrainConfig(1), teacher)
    with pytest.raises(ValueError, match="no calibration tokens: .*iterator"):
        quantize(Net(), batches, SCALAR)
