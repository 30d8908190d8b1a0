"""What a language model reads: its vocabulary, where its inputs go, batches of tokens, and padding.

All of this is decided here, because the obvious answers are wrong for some models. Models of text and images keep the
numbers of their language model in a configuration inside the configuration. Embeddings may have more rows than the
configuration says. Weights that accelerate keeps on disk are on the device "meta", while the model computes elsewhere.

A batch is a tensor of token ids [B, T], or what a tokenizer returns: a mapping with `input_ids` and, where texts were
padded to one length, `attention_mask`, both [B, T]. Padding counts nowhere. A model is called as

    model(input_ids=ids, use_cache=False).logits                 [B, T, vocabulary]

Limits: padding without a mask is noticed only where its token is not also the end of a text.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .errors import UsageError

WRAP = "wrap it in a module called as model(input_ids=ids, use_cache=False).logits: ids [B, T] to [B, T, vocabulary]"

Batch: TypeAlias = Tensor | Mapping[str, Tensor]


def vocabulary(model: nn.Module) -> int | None:
    """How many tokens the model can read, from the rows of its embeddings or its config; None if neither says."""
    return getattr(_embeddings(model), "num_embeddings", None) or getattr(text_config(model), "vocab_size", None)


def text_config(model: nn.Module) -> Any:
    """The part of the model's config that is about text, or all of it; None if it has none."""
    config: Any = getattr(model, "config", None)
    try:
        return config.get_text_config(decoder=True)
    except (AttributeError, ValueError):  # it has one part only, or several about text and does not say which is meant
        return config


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device that the embeddings compute on, wherever accelerate keeps their weight.

    ValueError where the weights are not in memory and nothing says where they are computed with.
    """
    ends = _embeddings(model), model
    tensors = chain(*(end.parameters() for end in ends), model.buffers(), [torch.empty(0, device="cpu")])
    if not (first := next(tensors)).is_meta:
        return first.device
    for module in chain(ends, model.modules()):
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    raise UsageError(f"the weights of {type(model).__name__} are not in memory (meta device): load it whole")


def check_model(model: nn.Module) -> None:
    """ValueError for a model that cannot be called as a causal language model."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UsageError(f"{name} has an encoder and a decoder: give a causal language model")
    taken = inspect.signature(model.forward).parameters
    missing = [needed for needed in ("input_ids", "use_cache") if needed not in taken]
    if missing and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        got = f"takes {', '.join(taken) or 'nothing'}, not {' and '.join(missing)}"
        raise UsageError(f"the forward of {name} {got}: {WRAP}")


def read_batch(batch: Batch, model: nn.Module, what: str) -> tuple[Tensor, Tensor | None]:
    """A batch's token ids [B, T], and which of them are text, bool [B, T], or None where all are.

    Raises ValueError for a batch that is not integers [B, T], for a mask of another shape or without any text, and for
    tokens that the model does not have. Warns of what looks like padding without a mask.
    """
    ids, mask = (batch.get("input_ids"), batch.get("attention_mask")) if isinstance(batch, Mapping) else (batch, None)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        got = _described(batch if ids is None else ids)
        raise UsageError(f"a {what} batch is {got}; give batches of token ids, integers [B, T]: windows.split(8)")
    check_tokens(ids, model, f"a {what} batch")
    if mask is None:
        _warn_of_padding(ids, model, what)
    elif not isinstance(mask, Tensor) or mask.shape != ids.shape or ids.numel() and not mask.any():
        found = f"the attention_mask of a {what} batch {list(ids.shape)} is {_described(mask)}"
        raise UsageError(f"{found}: it must have that shape, 1 for text and 0 for padding, and some text")
    return ids, None if mask is None or mask.all() else mask.bool()


def check_tokens(ids: Tensor, model: nn.Module, what: str) -> None:
    """ValueError for tokens that the model does not have."""
    size = vocabulary(model)
    if size and ids.numel() and not 0 <= ids.min() <= ids.max() < size:
        found = f"{what} holds tokens from {ids.min()} to {ids.max()}, the model knows 0 to {size - 1}"
        raise UsageError(f"{found}: encode the text with this model's own tokenizer")


def without_padding(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The text alone, as batches [n, t] of rows of equal length: for models that do not take masks, and for experts."""
    if mask is None:
        return [ids]
    rows: dict[int, list[Tensor]] = {}
    for row, text in zip(ids, mask, strict=True):
        if text.any():
            rows.setdefault(int(text.sum()), []).append(row[text])
    return [torch.stack(equal) for equal in rows.values()]


def run(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Any:
    """The model's output for token ids [B, T]; mask as from `read_batch`."""
    device = input_device(model)
    masked = {} if mask is None else {"attention_mask": mask.long().to(device)}
    return model(input_ids=ids.to(device), use_cache=False, **masked)


def logits_of(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The model's logits [B, T, vocabulary] for token ids [B, T]. ValueError where it returns something else."""
    output, name = run(model, ids, mask), type(model).__name__
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        got = f"logits {list(logits.shape)}" if isinstance(logits, Tensor) else f"{type(output).__name__}, no logits"
        raise UsageError(f"{name} returns {got} for token ids {list(ids.shape)}: use AutoModelForCausalLM, or {WRAP}")
    return logits


@contextmanager
def keep_modes(*models: nn.Module) -> Iterator[None]:
    """Afterwards every module is in training or evaluation mode as it was before, whatever its parent is in."""
    modes = [(module, module.training) for model in models for module in model.modules()]  # parents come first
    try:
        yield
    finally:
        for module, training in modes:
            module.train(training)  # some modules do more here than note the mode


def _embeddings(model: nn.Module) -> nn.Module:
    """The module that token ids enter, or the model itself where it does not say."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # not a model of transformers, or one that does not know
        return model
    return embeddings if isinstance(embeddings, nn.Module) else model


def _described(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _warn_of_padding(ids: Tensor, model: nn.Module, what: str) -> None:
    config = text_config(model)
    pad, end = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    known = isinstance(pad, int) and pad not in (end if isinstance(end, list) else [end])
    padding = ids == pad
    if known and ids.shape[1] > 1 and (padding[:, :2].all(1) | padding[:, -2:].all(1)).any():
        found = f"a {what} batch has rows that begin or end with the padding token {pad}, which counts as text"
        warnings.warn(f"{found}: give the tokenizer's attention_mask with it", RuntimeWarning, stacklevel=3)
