"""What a model reads: how many words it knows, how long a text it takes, where its inputs go, and batches of tokens.

All of this is asked in one place, because the obvious answers fail for some models. Models for text and images keep the
numbers of their language model in a configuration inside the configuration. Embeddings may have more rows than the
configuration says. Weights that accelerate keeps on disk are on the "meta" device, while the model computes elsewhere.

A batch is a tensor of token ids [B, T], or what a tokenizer returns: a mapping with `input_ids` and, where texts were
padded to one length, `attention_mask`, both [B, T]. A model is called as

    model(input_ids=ids, use_cache=False).logits                 [B, T, vocabulary]
"""

from __future__ import annotations

from torch import nn

LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "context_length")


def vocabulary(model: nn.Module) -> int | None:
    """How many tokens the model can read, from the rows of its embeddings or its config; None if neither says."""
    rows = getattr(_embeddings(model), "num_embeddings", None)
    return rows or _positive(_text_config(model), ("vocab_size",))


def longest_window(model: nn.Module) -> int | None:
    """How many positions the model can read, as its config says; None if that does not say."""
    return _positive(_text_config(model), LENGTHS)


def _embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no model of transformers, or one that does not know
        return None


def _text_config(model: nn.Module) -> object:
    config = getattr(model, "config", None)
    if not callable(getattr(config, "get_text_config", None)):
        return config
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # several parts for text: none can be told to be meant
        return config


def _positive(config: object, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
