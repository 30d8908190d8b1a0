"""Continue a prompt greedily: the most likely next token, again and again.

Greedy, so that equal models give equal texts. A model reads a limited number of positions; beyond it, a table of
positions raises an IndexError and rotary positions give nonsense. So prompt and continuation together stay within it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..language_model import check_tokens, input_device
from .batches import longest_window


def encode_prompt(model: nn.Module, tokenizer, prompt: str) -> Tensor:
    """Token ids [1, T] of a prompt, on the model's device.

    UsageError for a prompt without tokens, with tokens that the model does not have, or so long that no next token
    fits.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that Python could not decode
        raise UsageError(
            f"the prompt {ascii(prompt)} is not text: this console uses another encoding than it says. Set PYTHONUTF8=1"
        ) from None
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.long()
    if not ids.numel():
        raise UsageError("the prompt is empty: give at least one word to continue")
    check_tokens(ids, model, "the prompt")
    limit = longest_window(model)
    if limit is not None and ids.shape[1] >= limit:
        raise UsageError(
            f"the prompt has {ids.shape[1]} tokens, and the model reads {limit}, new ones included: shorten it"
        )
    return ids.to(input_device(model))


def continue_prompt(model: nn.Module, tokenizer, prompt: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Token ids of the prompt [T] and of its continuation, at most `tokens` of them; raises as encode_prompt does.

    There are fewer, with a note on stderr, where the model cannot read more.
    """
    ids = encode_prompt(model, tokenizer, prompt)
    left = (longest_window(model) or sys.maxsize) - ids.shape[1]
    if tokens > left:
        print(f"note: {left} new tokens instead of {tokens}, since the model cannot read more", file=sys.stderr)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(tokens, left),
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return ids[0], out[0, ids.shape[1] :]
