"""Windows of a text: all of them in order, in random batches to train on, or a few at random to calibrate on.

A window is `window` consecutive token ids of a text [T]. Windows do not overlap, and the T mod window ids that are left
over at the end are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import LongTensor, nn

from ..errors import UsageError
from ..language_model import text_config

LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "context_length")


def longest_window(model: nn.Module) -> int | None:
    """How many positions the model can read; None if its config has none of the usual names for that."""
    lengths = [getattr(text_config(model), name, None) for name in LENGTHS]
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def windows(ids: LongTensor, window: int) -> LongTensor:
    """Cut ids [T] into windows [T // window, window]. UsageError for ids that are not 1-D or shorter than a window."""
    if window < 1 or ids.dim() != 1 or len(ids) < window:
        raise UsageError(
            f"cannot cut ids of shape {tuple(ids.shape)} into windows of {window} tokens: needed are 1-D ids "
            "and 1 <= window <= number of ids; use a longer text or a shorter window"
        )
    return ids[: len(ids) // window * window].view(-1, window)


def batches(ids: LongTensor, window: int, batch_size: int, generator: torch.Generator) -> Iterator[LongTensor]:
    """Endless batches [batch_size, window]: an epoch shows each window at most once, in a new random order.

    The last windows of an epoch that do not fill a batch are dropped. UsageError, at the call, for a text of less than
    one batch.
    """
    rows = _rows(ids, window, batch_size, "a batch")

    def endless() -> Iterator[LongTensor]:
        while True:
            order = torch.randperm(len(rows), generator=generator)
            for start in range(0, len(rows) - batch_size + 1, batch_size):
                yield rows[order[start : start + batch_size]]

    return endless()  # an inner generator, so that bad arguments fail here and not at the first next()


def sample_windows(ids: LongTensor, count: int, window: int, generator: torch.Generator) -> LongTensor:
    """`count` distinct random windows [count, window]. UsageError for a text that has fewer."""
    rows = _rows(ids, window, count, "a sample")
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def _rows(ids: LongTensor, window: int, count: int, what: str) -> LongTensor:
    rows = windows(ids, window)
    if not 1 <= count <= len(rows):
        raise UsageError(
            f"cannot draw {what} of {count} windows: the text holds {len(rows)} windows of {window} tokens; use a "
            "number between 1 and that, a shorter window or a longer text"
        )
    return rows
