"""Rounding with error feedback: the codes of a weight matrix from which its layer's output changes least.

With the second moments H of a layer's inputs (ptq/moments.py), the mean squared change of its output is the proxy loss

    loss(W_hat) = tr( (W_hat - W) H (W_hat - W)^T )          one term per row: rows do not interact

Plain rounding ignores that errors in correlated inputs can cancel. Feedback rounding (LDLQ in QuIP#,
OPTQ/GPTQ for vectors of one weight) lets them. Factor H = C C^T (Cholesky, C lower triangular), cut it in
blocks of d columns, and go from the last vector of columns to the first:

    t_k     = W_k + sum_{j>k} (W_j - W_hat_j) L_jk           weight + carried error, L_jk = C_jk C_kk^-1
    W_hat_k = nearest codeword to t_k in the metric C_kk     i.e. least | C_kk^T (t_k - W_hat_k) |^2

Then loss = sum_k | C_kk^T (t_k - W_hat_k) |^2 exactly: what is left over is each vector's own rounding error.
The metric matters for d > 1: the nearest codeword in plain distance is not the one of least loss.

The sums over later columns are taken for FEEDBACK_BLOCK columns at once, so almost all work is matrix
products. For each row, several scales are tried, with and without feedback, and the best is kept: feedback
never loses to plain rounding.

Limits: the codes are found greedily, once, vector by vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..codebook.affine import AffineCodebook
from ..codebook.digits import digits_of
from ..codebook.matrix import Codebook, CodedMatrix
from ..codebook.search import Search
from ..errors import UsageError
from .moments import Factor

FEEDBACK_BLOCK = 64
TALL_ELEMENTS = 1 << 24  # weights rounded at a time: as many scales as fit are tried side by side, as rows
SMALLEST_SCALE = 1e-12  # of a row of zeros: no codeword need be zero, so they are all made negligible
SCALE_FACTORS = (0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6)  # of a row's root mean square: the first round of candidates


@dataclass(frozen=True)
class Rounded:
    """A rounded matrix, and what rounding knows of it.

    target: fp32 [out, n], what each vector was rounded from, in units of the row scale: the weight plus the carried
    error, where latents start. loss: fp64 [out], the proxy loss of each row under the damped H.
    """

    coded: CodedMatrix
    target: Tensor
    loss: Tensor


def proxy_loss(error: Tensor, H: Tensor) -> Tensor:
    """Each row's e H e^T: error [out, n], H [n, n] -> fp64 [out]."""
    return ((error @ H) * error).double().sum(1)


def plain_round(W: Tensor, scale: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Nearest codewords: W [out, n], scale [out] -> index [out, n/d], target [out, n] = W / scale."""
    target = W / scale[:, None]
    return codebook.encode(target.reshape(-1, codebook.dim)).view(len(W), -1), target


def ldlq_round(W: Tensor, scale: Tensor, codebook: Codebook, factor: Factor) -> tuple[Tensor, Tensor]:
    """Rounding with error feedback (block LDLQ): shapes as in plain_round; target holds the carried error."""
    n, d = W.shape[1], codebook.dim
    L, metrics = _feedback_of(factor, d)
    search: Search = codebook.searcher(metrics)
    words = codebook.codewords().T.contiguous()
    target = W.T.clone(memory_format=torch.contiguous_format).div_(scale)  # [n, out]: a vector is d rows
    error = torch.empty_like(target)  # W - W_hat
    targets, errors = target.split(d), error.split(d)  # of each vector
    index = torch.empty(n // d, len(W), dtype=torch.long, device=W.device)
    block = max(1, FEEDBACK_BLOCK // d) * d
    for end in range(n, 0, -block):
        start = max(0, end - block)
        error[start:end] = target[start:end]
        target[start:end].addmm_(L[start:end, end:], error[end:])  # from later blocks: most of the work
        for k in range(end - d, start - 1, -d):
            g = k // d
            if k + d < end:
                targets[g].addmm_(L[k : k + d, k + d : end], error[k + d : end])  # from this block
            index[g] = found = search(targets[g], g)
            errors[g].sub_(words.index_select(1, found))
    return index.T, target.T


def _feedback_of(factor: Factor, d: int) -> tuple[Tensor, Tensor]:
    """Feedback (C C_kk^-1)^T of each vector's columns, fp32 [n, n]; metrics C_kk over their mean, [n/d, d, d]."""
    C, groups = factor.C, len(factor.C) // d
    blocks = C.unfold(0, d, d).unfold(1, d, d).diagonal(dim1=0, dim2=1).permute(2, 0, 1)  # [n/d, d, d]
    by_vector = C.float().T.reshape(groups, d, -1)  # C_k^T, [d, n]
    L = torch.linalg.inv(blocks).mT.float() @ by_vector
    metrics = blocks / blocks.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return L.flatten(0, 1), metrics.float()


def round_matrix(
    W: Tensor, factor: Factor, codebook: Codebook, scales: Iterable[Tensor], feedback: bool = True
) -> Rounded:
    """Quantize W [out, n], each row at the one of `scales` (fp32 [out] each) of least proxy loss.

    Rounds plainly and, if asked, with feedback: as plain rounding is among the candidates, feedback never
    loses to it. Raises ValueError where W, the second moments and the codebook do not fit together, or
    where W holds NaN or infinity.
    """
    n, d = W.shape[1], codebook.dim
    if n % d or len(factor.H) != n:
        got = f"rows of {n} weights, moments of {len(factor.H)} inputs, vectors of {d} weights"
        raise UsageError(f"round_matrix: {got}; the first two must be equal and a multiple of the third: pad them")
    if not torch.isfinite(W).all():
        raise UsageError("round_matrix: the weights hold NaN or infinity. Check where they come from.")
    methods: list[Callable] = [plain_round, partial(ldlq_round, factor=factor)] if feedback else [plain_round]
    words = codebook.codewords()  # decodes 8 times faster than the formula, for the price of a lookup
    rounded: list[Rounded] = []
    for group in torch.stack(list(scales)).split(max(1, TALL_ELEMENTS // W.numel())):
        for method in methods:
            found = method(W.repeat(len(group), 1), group.flatten(), codebook)
            index, target = (part.unflatten(0, group.shape) for part in found)  # [scales, out, ...]
            for each in zip(index, group, target, strict=True):
                rounded = [_best_rows([*rounded, _with_loss(W, factor.H, codebook, words, *each)])]
    return rounded[0]


def _with_loss(
    W: Tensor, H: Tensor, book: Codebook, words: Tensor, index: Tensor, scale: Tensor, target: Tensor
) -> Rounded:
    loss = proxy_loss(words[index].flatten(1) * scale[:, None] - W, H)
    return Rounded(CodedMatrix(book, index, scale), target, loss)


def _best_rows(found: list[Rounded]) -> Rounded:
    """Each row from the one of one or two that loses less there."""
    best, *others = found
    for other in others:
        win = other.loss < best.loss
        index = torch.where(win[:, None], other.coded.index, best.coded.index)
        scale = torch.where(win, other.coded.scale, best.coded.scale)
        target = torch.where(win[:, None], other.target, best.target)
        loss = torch.where(win, other.loss, best.loss)
        best = Rounded(CodedMatrix(best.coded.codebook, index, scale), target, loss)
    return best


def row_scales(W: Tensor, factors: Iterable[float] = SCALE_FACTORS) -> list[Tensor]:
    """Candidates for `round_matrix`: `factors` times each row's root mean square, at least SMALLEST_SCALE."""
    rms = W.square().mean(1).sqrt()
    return [(factor * rms).clamp(min=SMALLEST_SCALE) for factor in factors]


def refit(W: Tensor, coded: CodedMatrix[AffineCodebook], H: Tensor) -> AffineCodebook:
    """Least-squares (A, b) for fixed codes and scales under the proxy loss: a codebook that knows the data.

    The loss is quadratic in theta = (A, b), d (k + 1) numbers. With Z_j [out, n/d] the scaled digits j (ones
    for j = k), H_ii' the [n/d, n/d] part of H between coordinates i and i' of the vectors:
    normal matrix[(i,j), (i',j')] = sum( (Z_j^T Z_j') * H_ii' ),  right side[(i,j)] = sum( Z_j * (W H)_i ).
    """
    book = coded.codebook
    d, k = book.A.shape
    q = digits_of(coded.index, k, book.levels)
    Z = torch.cat([q, torch.ones_like(q[..., :1])], dim=2) * coded.scale[:, None, None]  # [out, n/d, k+1]
    groups = W.shape[1] // d
    parts = H.reshape(groups, d, groups, d).permute(1, 3, 0, 2).reshape(d * d, -1)
    # One digit j at a time: all at once take k + 1 times the memory, gigabytes for wide layers.
    sums = [torch.einsum("og,ohl->lgh", Z_j, Z).flatten(1) @ parts.T for Z_j in Z.unbind(2)]
    normal = torch.stack(sums).double().view(k + 1, k + 1, d, d).permute(2, 0, 3, 1).reshape(d * (k + 1), -1)
    right = torch.einsum("ogj,ogi->ij", Z, (W @ H).view(len(W), groups, d)).double().flatten()
    ridge = 1e-9 * normal.diagonal().mean() * torch.eye(len(normal), dtype=torch.float64, device=W.device)
    theta = torch.linalg.solve(normal + ridge, right).view(d, k + 1).float()
    return AffineCodebook(theta[:, :k].contiguous(), theta[:, k].contiguous(), book.levels)
