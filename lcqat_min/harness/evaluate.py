"""How good a quantized language model is: its perplexity, and its divergence from the model it was made from.

Perplexity. A causal model gives each token t_i a probability from the tokens before it. With N scored tokens

    nll = -(1/N) sum_i log p(t_i | context_i)        nats per token
    perplexity = exp(nll)                            1: certain, size of the vocabulary: uniform guessing

The number depends on what each token is allowed to see, so a result carries its parameters:

    window   tokens that the model reads at once
    stride   tokens from the start of one window to the start of the next
    bos      a token put before every window, or none

    stride = window (the papers' protocol)           stride < window
    |0 1 2 3|4 5 6 7|8 9         text, window 4      |0 1 2 3|             stride 2
      . . .   . . .              scored                . . .
                                                         |2 3 4 5|         scored: the new tokens,
                                                              . .          each once, with a minimum of
                                                             |4 5 6 7|     window - stride tokens
                                                                  . .      of context

With stride = window the first token of each window has no context and is scored only if there is a `bos`; an incomplete
last window is dropped. With stride < window no token is dropped: the last window is moved back to the end of the text.
A smaller stride gives more context, for window / stride times the work. Compare numbers only if text, tokenizer,
window, stride and bos agree.

Divergence. KL(teacher || model) = sum_v p_v (log p_v - log q_v), a mean over all positions, in nats per token. It
compares whole distributions where perplexity uses one probability of each, so on a small text it separates models whose
perplexities agree within the noise. It says how far a model has moved, not whether it has become better.

Cost: one forward pass per window. The peak of memory is the logits of a batch, batch_size x window x vocabulary: what
follows them works on slices of at most 64 MiB.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..language_model import check_model, check_tokens, keep_modes, logits_of

SLICE_ELEMENTS = 2**24  # logits upcast at a time: 64 MiB in float32
IGNORED = -100  # the label of a position that is not scored: never a token id, and what cross_entropy leaves out


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with all that is needed to repeat it."""

    value: float  # exp(nll)
    nll: float  # mean negative log-likelihood, nats per token
    tokens: int  # number of scored tokens
    window: int  # tokens read at once, without bos
    stride: int  # tokens from one window to the next
    bos: int | None  # token id before each window

    def __str__(self) -> str:
        return (
            f"perplexity {self.value:.4g} ({self.nll:.4f} nats per token, {self.tokens} tokens scored; "
            f"window {self.window}, stride {self.stride}, bos {self.bos})"
        )


def perplexity(
    model: nn.Module,
    ids: Tensor,
    window: int = 256,
    stride: int | None = None,
    bos: int | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """Perplexity of a causal language model on a text.

    Args:
        model: `model(input_ids=x, use_cache=False).logits` is [batch, length, vocabulary], any float dtype.
            Runs on its own device, in evaluation mode; each module's mode is restored afterwards.
        ids: integer [T], the token ids of the text, T >= window.
        window: tokens the model reads at once; with `bos` it reads window + 1.
        stride: 1 ... window; None means window.
        bos: token id put before every window, or None.
        batch_size: windows in one forward pass.
    Returns: the result with its parameters; log-softmax in float32, sums in float64.
    Raises: UsageError if an argument is out of range, the text is shorter than one window or of another vocabulary, or
        the model is not a causal language model.
    """
    stride = window if stride is None else stride
    _check(ids, window, stride, batch_size, 2 if bos is None else 1, model)
    if bos is not None:
        check_tokens(torch.tensor([bos]), model, "bos")
    total, tokens = 0.0, 0
    with _evaluating(model):
        for x, new in _window_batches(ids, window, stride, batch_size):
            x, labels = _with_labels(x, new, bos)
            total += _sum_nll(logits_of(model, x), labels)
            tokens += int((labels != IGNORED).sum())
    nll = total / tokens
    value = torch.tensor(nll, dtype=torch.float64).exp().item()  # math.exp would raise where this gives inf
    return Perplexity(value, nll, tokens, window, stride, bos)


def kl_to(teacher: nn.Module, model: nn.Module, ids: Tensor, window: int = 256, batch_size: int = 8) -> float:
    """Mean KL(teacher || model) in nats per token, over all positions of the non-overlapping windows of `ids`.

    Args:
        teacher, model: causal language models as in `perplexity`, one vocabulary; their devices may differ.
        ids: integer [T], T >= window; an incomplete last window is dropped.
    Returns: 0 for equal models; rounding in float32 can leave a tiny negative number for nearly equal ones.
    Raises: UsageError if an argument is out of range or the vocabularies differ in size.
    """
    _check(ids, window, window, batch_size, 1, teacher, model)
    total, positions = 0.0, 0
    with _evaluating(teacher, model):
        for x, _ in _window_batches(ids, window, window, batch_size):
            total += _sum_kl(*_both_logits(teacher, model, x))
            positions += x.numel()
    return total / positions


def _check(ids: Tensor, window: int, stride: int, batch_size: int, shortest_window: int, *models: nn.Module) -> None:
    if ids.dim() != 1 or ids.is_floating_point():
        raise UsageError(f"ids must be integers of shape [T], got {ids.dtype} of shape {list(ids.shape)}")
    if window < shortest_window:
        raise UsageError(f"window must be at least {shortest_window} to score a token, got {window}")
    if not 1 <= stride <= window:
        raise UsageError(f"stride must be 1 ... window ({window}) so that no token is left out, got {stride}")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    if len(ids) < window:
        raise UsageError(
            f"the text has {len(ids)} tokens, less than one window of {window}: "
            f"pass a longer text, or a window of at most {len(ids)}"
        )
    for model in models:
        check_model(model)
        check_tokens(ids, model, "the text")


def _window_batches(ids: Tensor, window: int, stride: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of windows [batch, window] with, for each, how many of its last tokens are new [batch, 1]."""
    begins = torch.arange(0, len(ids) - window + 1, stride)
    if stride < window and begins[-1] + window < len(ids):
        begins = torch.cat([begins, torch.tensor([len(ids) - window])])
    new = torch.diff(begins, prepend=torch.tensor([-window]))  # the first window is new as a whole
    offsets = torch.arange(window)
    for b, n in _progress(list(zip(begins.split(batch_size), new.split(batch_size), strict=True))):
        yield ids[(b[:, None] + offsets).to(ids.device)].long(), n[:, None].to(ids.device)


def _with_labels(x: Tensor, new: Tensor, bos: int | None) -> tuple[Tensor, Tensor]:
    """What the model reads [batch, L] and, for each position, the token it has to predict or IGNORED."""
    if bos is not None:
        x = F.pad(x, (1, 0), value=bos)
    length = x.shape[1]
    seen_before = torch.arange(length, device=x.device) < length - new
    labels = x.masked_fill(seen_before, IGNORED).roll(-1, dims=1)
    labels[:, -1] = IGNORED  # nothing follows the last token
    return x, labels


def _sum_nll(logits: Tensor, labels: Tensor) -> float:
    """Sum of -log p(label) over the scored positions; logits [batch, L, V], labels [batch, L]."""
    logits, labels = logits.flatten(0, 1), labels.flatten().to(logits.device)
    total = 0.0
    for rows in (labels != IGNORED).nonzero().squeeze(1).split(_rows_a_slice(logits)):
        nll = F.cross_entropy(logits[rows].float(), labels[rows], reduction="none")
        total += nll.cpu().double().sum().item()  # to the CPU first: Apple's GPUs have no float64
    return total


def _sum_kl(teacher_logits: Tensor, logits: Tensor) -> float:
    """Sum of KL(teacher || model) over all positions; both [batch, L, V]."""
    rows = _rows_a_slice(logits)
    pairs = zip(teacher_logits.flatten(0, 1).split(rows), logits.flatten(0, 1).split(rows), strict=True)
    total = 0.0
    for p, q in pairs:
        log_p, log_q = F.log_softmax(p.float(), -1), F.log_softmax(q.to(p.device).float(), -1)
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        total += kl.cpu().double().sum().item()
    return total


def _rows_a_slice(logits: Tensor) -> int:
    return max(1, SLICE_ELEMENTS // logits.shape[-1])


def _both_logits(teacher: nn.Module, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    teacher_logits, logits = logits_of(teacher, x), logits_of(model, x)
    if (theirs := teacher_logits.shape[-1]) != (ours := logits.shape[-1]):
        raise UsageError(
            f"the teacher has a vocabulary of {theirs} tokens, the model of {ours}: "
            "KL needs one vocabulary, so compare models that share a tokenizer and its padding"
        )
    return teacher_logits, logits


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    with keep_modes(*models), torch.inference_mode():
        for model in models:
            model.eval()
        yield


def _progress(batches: list) -> Iterable:
    try:
        from tqdm import tqdm
    except ImportError:  # then there is no bar
        return batches
    return tqdm(batches, desc="evaluate", unit="batch", leave=False)
