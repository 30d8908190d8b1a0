"""Continue a prompt: the most likely next token, again and again, as far as the model reads.

Greedy, so that equal models give equal texts. A model knows positions up to some number; past it a table of positions
ends in an IndexError, and rotated ones in nonsense. So prompt and continuation together stay within it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from ..language_model import check_tokens, input_device, longest_window


def encode_prompt(model: nn.Module, tokenizer, prompt: str) -> Tensor:
    """Token ids [1, T] of a prompt, on the model's device.

    ValueError for a prompt without tokens, with tokens that the model does not have, and for one that leaves no room
    for a next token.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that Python could not decode
        raise ValueError(
            f"the prompt {ascii(prompt)} is no text: this console uses another encoding than it says. Set PYTHONUTF8=1"
        ) from None
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.long()
    if not ids.numel():
        raise ValueError("the prompt is empty: give at least one word to continue")
    check_tokens(ids, model, "the prompt")
    limit = longest_window(model)
    if limit is not None and ids.shape[1] >= limit:
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens, and the model reads {limit} with what it adds: give a "
            "shorter prompt"
        )
    return ids.to(input_device(model))


def continue_prompt(model: nn.Module, tokenizer, prompt: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Token ids of the prompt [T] and of its continuation, at most `tokens` of them; raises as encode_prompt does.

    Fewer, with a note on stderr, where the model reads no more.
    """
    ids = encode_prompt(model, tokenizer, prompt)
    room = (longest_window(model) or sys.maxsize) - ids.shape[1]
    if tokens > room:
        print(f"note: {room} new tokens instead of {tokens}, as the model reads no more", file=sys.stderr)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(tokens, room),
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return ids[0], out[0, ids.shape[1] :]
