"""What a model reads: how many tokens it knows, how long a text it takes, where its inputs go, and batches of tokens.

All of this is asked here, because the obvious answers are wrong for some models. Models of text and images keep the
numbers of their language model in a configuration inside the configuration. Embeddings may have more rows than the
configuration says. Weights that accelerate keeps on disk are on the device "meta", while the model computes elsewhere.

A batch is a tensor of token ids [B, T], or what a tokenizer returns: a mapping with `input_ids` and, where texts were
padded to one length, `attention_mask`, both [B, T]. Padding counts nowhere. A model is called as

    model(input_ids=ids, use_cache=False).logits                 [B, T, vocabulary]
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from .errors import UsageError

CALL = "model(input_ids=ids, use_cache=False).logits, ids [B, T], logits [B, T, vocabulary]"
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "context_length")
IGNORED = -100  # label of a position that is not scored; never a token id, and what cross_entropy passes over

Batch = Tensor | Mapping[str, Tensor]


def vocabulary(model: nn.Module) -> int | None:
    """How many tokens the model can read, from the rows of its embeddings or its config; None if neither says."""
    rows = getattr(_embeddings(model), "num_embeddings", None)
    return rows or _positive(text_config(model), ("vocab_size",))


def longest_window(model: nn.Module) -> int | None:
    """How many positions the model can read, as its config says; None if that does not say."""
    return _positive(text_config(model), LENGTHS)


def text_config(model: nn.Module) -> object:
    """The part of the model's config that is about text, or all of it; None if it has none."""
    config = getattr(model, "config", None)
    if not callable(getattr(config, "get_text_config", None)):
        return config
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # it has several parts about text, and does not say which one is meant
        return config


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device that the embeddings compute on, wherever their weight waits (accelerate).

    ValueError for weights that are nowhere.
    """
    ends = [part for part in (_embeddings(model), model) if isinstance(part, nn.Module)]
    tensors = chain(*(part.parameters() for part in ends), model.buffers())
    if not (first := next(tensors, torch.empty(0, device="cpu"))).is_meta:
        return first.device
    for module in chain(ends, model.modules()):
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):  # one, or several in a row
            if (device := getattr(part, "execution_device", None)) is not None:
                return torch.device(device)
    raise UsageError(f"the weights of {type(model).__name__} are not in memory (meta device): load it whole")


def check_model(model: nn.Module) -> None:
    """ValueError for a model that cannot be called as a causal language model."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UsageError(f"{type(model).__name__} has an encoder and a decoder: give a causal language model, {CALL}")
    try:
        taken = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # compiled code does not say what it takes
        return
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    if missing := [name for name in ("input_ids", "use_cache") if name not in taken and not anything]:
        raise UsageError(
            f"the forward of {type(model).__name__} takes {', '.join(taken) or 'nothing'}, not "
            f"{' and '.join(missing)}: wrap it in a module that is called as {CALL}"
        )


def read_batch(batch: Batch, model: nn.Module, what: str) -> tuple[Tensor, Tensor | None]:
    """A batch's token ids [B, T], and which of them are text, bool [B, T]; None where all are.

    Raises ValueError for a batch that is no integers [B, T], for a mask of another shape or without any text, and for
    tokens that the model does not have. Warns of what looks like padding without a mask.
    """
    ids, mask = (batch.get("input_ids"), batch.get("attention_mask")) if isinstance(batch, Mapping) else (batch, None)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(batch).__name__
        raise UsageError(
            f"a {what} batch is {got}; give batches of token ids, integers [B, T]: for one tensor of "
            'windows [n, T] that is windows.split(8), from a tokenizer return_tensors="pt"'
        )
    check_tokens(ids, model, f"a {what} batch")
    if mask is None:
        _warn_of_padding(ids, model, what)
        return ids, None
    if not isinstance(mask, Tensor) or mask.shape != ids.shape or ids.numel() and not mask.any():
        got = f"{list(mask.shape)}, {int(mask.sum())} of it text" if isinstance(mask, Tensor) else type(mask).__name__
        raise UsageError(
            f"the attention_mask of a {what} batch {list(ids.shape)} is {got}: it must have that shape, "
            "1 for text and 0 for padding, and some text"
        )
    return ids, None if mask.all() else mask.bool()


def check_tokens(ids: Tensor, model: nn.Module, what: str) -> None:
    """ValueError for tokens that the model does not have."""
    words = vocabulary(model)
    if words and ids.numel() and not 0 <= ids.min() <= ids.max() < words:
        raise UsageError(
            f"{what} holds tokens from {ids.min()} to {ids.max()}, the model knows 0 to {words - 1}: "
            "encode the text with this model's own tokenizer"
        )


def without_padding(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The text alone, as batches [n, t] of rows of one length: for models that do not take masks, and for experts."""
    if mask is None:
        return [ids]
    rows: dict[int, list[Tensor]] = {}
    for row, text in zip(ids, mask, strict=True):
        if text.any():
            rows.setdefault(int(text.sum()), []).append(row[text])
    return [torch.stack(alike) for alike in rows.values()]


def run(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> object:
    """The model's output for token ids [B, T]; mask as from `read_batch`."""
    device = input_device(model)
    masked = {} if mask is None else {"attention_mask": mask.long().to(device)}
    return model(input_ids=ids.to(device), use_cache=False, **masked)


def logits_of(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The model's logits [B, T, vocabulary] for token ids [B, T]. ValueError where it returns something else."""
    output = run(model, ids, mask)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        got = f"logits {list(logits.shape)}" if isinstance(logits, Tensor) else f"{type(output).__name__}, no logits"
        raise UsageError(
            f"{type(model).__name__} returns {got} for token ids {list(ids.shape)}. Load it with its head "
            f"(AutoModelForCausalLM), or wrap it in a module that is called as {CALL}"
        )
    return logits


@contextmanager
def keep_modes(*models: nn.Module) -> Iterator[None]:
    """Afterwards every module is in training or evaluation mode as it was before, whatever its parent is in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    whole = [(model, model.training) for model in models]
    try:
        yield
    finally:
        for model, training in whole:
            model.train(training)  # some modules do more there than to note the mode
        for module, training in modes:
            module.training = training


def _embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no model of transformers, or one that does not know
        return None


def _positive(config: object, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _warn_of_padding(ids: Tensor, model: nn.Module, what: str) -> None:
    config = text_config(model)
    pad, end = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    if not isinstance(pad, int) or pad in (end if isinstance(end, list) else [end]) or ids.shape[1] < 2:
        return
    padding = ids == pad
    if (padding[:, :2].all(1) | padding[:, -2:].all(1)).any():
        warnings.warn(
            f"a {what} batch has rows that begin or end with the padding token {pad}, which would count as "
            "text: give what the tokenizer returns, with its attention_mask",
            RuntimeWarning,
            stacklevel=3,
        )
