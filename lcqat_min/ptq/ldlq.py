"""Rounding with error feedback: the codes of a weight matrix from which its layer's output changes least.

With the second moments H of a layer's inputs (ptq/moments.py), the mean squared change of its output is the proxy loss

    loss(W_hat) = tr( (W_hat - W) H (W_hat - W)^T )          one term per row: rows do not interact

Plain rounding ignores that errors in correlated inputs can cancel. Feedback rounding (LDLQ in QuIP#,
OPTQ/GPTQ for vectors of one weight) lets them. Factor H = C C^T (Cholesky, C lower triangular), cut it in
blocks of d columns, and go from the last vector of columns to the first:

    t_k     = W_k + sum_{j>k} (W_j - W_hat_j) L_jk           weight + carried error, L_jk = C_jk C_kk^-1
    W_hat_k = nearest codeword to t_k in the metric C_kk     i.e. smallest | C_kk^T (t_k - W_hat_k) |^2

Then loss = sum_k | C_kk^T (t_k - W_hat_k) |^2 exactly: what is left over is each vector's own rounding error.
The metric matters for d > 1: the nearest codeword in plain distance is not the one of the smallest loss.

The sums over later columns are taken for FEEDBACK_BLOCK columns at once, so almost all work is matrix
products. For each row, several scales are tried, with and without feedback, and the best is kept: feedback
never loses to plain rounding.

Limits: the codes are found greedily, once, vector by vector.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..codebook.matrix import Codebook, CodedMatrix, M
from ..errors import UsageError
from .moments import Factor

FEEDBACK_BLOCK = 64
TALL_ELEMENTS = 1 << 24  # weights rounded at a time: as many scales as fit are tried side by side, as rows
SMALLEST_SCALE = 1e-12  # of a row of zeros: no codeword need be zero, so they are all made negligible
SCALE_FACTORS = (0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6)  # of a row's root mean square: the first round of candidates


class Rounded(NamedTuple):
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
    L, metrics = feedback_of(factor.C, d)
    search, words = codebook.searcher(metrics), codebook.codewords().T.contiguous()
    target = W.T.clone(memory_format=torch.contiguous_format).div_(scale)  # [n, out]: a vector is d rows
    error = target.clone()  # W - W_hat, once a vector is rounded
    index = torch.empty(n // d, len(W), dtype=torch.long, device=W.device)
    block = max(1, FEEDBACK_BLOCK // d) * d
    for end in range(n, 0, -block):
        start = max(0, end - block)
        target[start:end].addmm_(L[start:end, end:], error[end:])  # from later blocks: most of the work
        for k in range(end - d, start - 1, -d):
            vector = slice(k, k + d)
            target[vector].addmm_(L[vector, k + d : end], error[k + d : end])  # from this block
            index[k // d] = search(target[vector], k // d)
            error[vector].sub_(words.index_select(1, index[k // d]))
    return index.T, target.T


def feedback_of(C: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Feedback (C C_kk^-1)^T of each vector's columns, fp32 [n, n]; metrics C_kk, their mean 1, [n/d, d, d]."""
    blocks = torch.stack([C[k : k + d, k : k + d] for k in range(0, len(C), d)])
    L = torch.linalg.inv(blocks).mT.float() @ C.float().T.reshape(-1, d, len(C))
    return L.flatten(0, 1), (blocks / blocks.diagonal(dim1=1, dim2=2).mean()).float()


def round_matrix(
    W: Tensor, factor: Factor, codebook: Codebook, scales: Iterable[Tensor], feedback: bool = True
) -> Rounded:
    """Quantize W [out, n], each row at the one of `scales` (fp32 [out] each) of the smallest proxy loss.

    Rounds plainly and, if asked, with feedback: as plain rounding is among the candidates, feedback never
    loses to it. Raises ValueError where W, the second moments and the codebook do not fit together, or
    where W holds NaN or infinity.
    """
    n, d = W.shape[1], codebook.dim
    if n % d or len(factor.H) != n:
        got = f"rows of {n} weights, moments of {len(factor.H)} inputs, vectors of {d} weights"
        raise UsageError(f"{got}; the first two must be equal and a multiple of the third: pad them")
    if not torch.isfinite(W).all():
        raise UsageError("the weights hold NaN or infinity. Check where they come from.")
    return reduce(better_rows, _candidates(W, factor, codebook, torch.stack(list(scales)), feedback))


def _candidates(W: Tensor, factor: Factor, codebook: Codebook, scales: Tensor, feedback: bool) -> Iterator[Rounded]:
    """W rounded at each of `scales`, fp32 [candidates, out]: plainly and, if asked, with feedback."""
    methods: list[Callable] = [plain_round, partial(ldlq_round, factor=factor)] if feedback else [plain_round]
    words = codebook.codewords()  # decodes 8 times faster than the formula, for the price of a lookup
    for group in scales.split(max(1, TALL_ELEMENTS // W.numel())):
        for method in methods:
            indices, targets = method(W.repeat(len(group), 1), group.flatten(), codebook)
            for index, scale, target in zip(indices.split(len(W)), group, targets.split(len(W)), strict=True):
                loss = proxy_loss(words[index].flatten(1) * scale[:, None] - W, factor.H)
                yield Rounded(CodedMatrix(codebook, index, scale), target, loss)


def better_rows(one: Rounded, other: Rounded) -> Rounded:
    """Each row from the one that loses less there."""
    win = other.loss < one.loss
    index = torch.where(win[:, None], other.coded.index, one.coded.index)
    scale = torch.where(win, other.coded.scale, one.coded.scale)
    target = torch.where(win[:, None], other.target, one.target)
    coded = CodedMatrix(one.coded.codebook, index, scale)
    return Rounded(coded, target, torch.where(win, other.loss, one.loss))


def row_scales(W: Tensor, factors: Iterable[float] = SCALE_FACTORS) -> list[Tensor]:
    """Candidates for `round_matrix`: `factors` times each row's root mean square, at least SMALLEST_SCALE."""
    rms = W.square().mean(1).sqrt()
    return [(factor * rms).clamp(min=SMALLEST_SCALE) for factor in factors]


def refit(W: Tensor, coded: CodedMatrix[M], H: Tensor) -> M:
    """The least-squares map of a codebook for fixed codes and scales under the proxy loss: it then knows the data.

    The weights are linear in the map [d, k]: w_g = map @ f_g, with the features f of codebook/matrix.py (for A and b
    the digits and a one). So the loss is quadratic. With Z_j the feature j, scaled, [out, n/d], and H_i the rows of H
    for coordinate i of the vectors, [n/d, n], whose columns i' are those of coordinate i': normal matrix[(i,j),
    (i',j')] = sum( (Z_j H_i)_i' * Z_j' ),  right side[(i,j)] = sum( Z_j * (W H)_i ).
    """
    book, (out, groups) = coded.codebook, coded.index.shape
    Z = (book.features(coded.index) * coded.scale[:, None, None]).flatten(0, 1)  # [out n/d, k]
    d, k = book.dim, Z.shape[1]
    normal = torch.stack(  # one feature at a time: all at once take k times the memory, gigabytes for wide layers
        [(Z_j.view(out, groups) @ H[i::d]).view(-1, d).T @ Z for i in range(d) for Z_j in Z.unbind(1)]
    )
    normal = normal.view(d * k, d * k).double()
    normal.diagonal().add_(1e-9 * normal.diagonal().mean())
    right = ((W @ H).view(-1, d).T @ Z).double().flatten()
    return book.with_map(torch.linalg.solve(normal, right).view(d, k))
