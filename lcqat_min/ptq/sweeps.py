"""Sweeps: coordinate descent, after rounding with feedback. Each vector once more, with all others as they are now.

Feedback (ptq/ldlq.py) decides from the last vector to the first and never looks back. But once all are rounded, each
can be chosen again in the light of all the others. With the errors E = W - W_hat and H_gg the [d, d] part of H of
vector g, the proxy loss as a function of w_g alone is

    loss = (w_g - t_g) H_gg (w_g - t_g)^T + rest        t_g = W_g + sum_{j != g} e_j H_jg H_gg^-1

so the best codeword is the nearest to t_g in the metric H_gg: one search per vector, as in feedback. A vector changes
only where that lowers the loss, so no sweep raises it. Within a block of columns (E H) is updated after each vector,
for all other columns after each block: one product with H per sweep.

QuantEase (arXiv 2309.01885) rounds so from the start; QuIP#'s released code does it after feedback.

Limits: it ends in a minimum in which no single vector can be improved, after about six sweeps. Not for a trellis, in
which no vector stands alone, and whose search has looked ahead (ptq/viterbi.py).
"""

import torch
from torch import Tensor

from ..codebook.matrix import Codebook, CodedMatrix
from .ldlq import FEEDBACK_BLOCK, TALL_ELEMENTS, Rounded, proxy_loss


def swept(W: Tensor, rounded: Rounded, H: Tensor, sweeps: int) -> Rounded:
    """`rounded` after `sweeps` over all vectors of W [out, n], or as many as change one; H [n, n] as for its loss."""
    book, scale = rounded.coded.codebook, rounded.coded.scale
    rows = max(1, TALL_ELEMENTS // W.shape[1])
    parts = zip(
        W.split(rows), scale.split(rows), rounded.coded.index.split(rows), rounded.target.split(rows), strict=True
    )
    found = [_sweep_rows((w / s[:, None]).T, book, index.T, target.T, H, sweeps) for w, s, index, target in parts]
    index, target = (torch.cat(tensors, dim=1).T.contiguous() for tensors in zip(*found, strict=True))
    coded = CodedMatrix(book, index, scale)
    return Rounded(coded, target, proxy_loss(coded.weight() - W, H))


def _sweep_rows(
    x: Tensor, book: Codebook, index: Tensor, target: Tensor, H: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """x [n, out], index [n/d, out], target [n, out] -> index, target. The rows of W come last, as in ldlq.py."""
    n, d = len(x), book.dim
    blocks = torch.stack([H[k : k + d, k : k + d] for k in range(0, n, d)]).double()
    metrics, inverse = torch.linalg.cholesky(blocks).float(), torch.linalg.inv(blocks).float()
    search, words = book.searcher(metrics / metrics.diagonal(dim1=1, dim2=2).mean()), book.codewords().T.contiguous()
    index, target = index.clone(), target.clone()
    E = x - words[:, index].transpose(0, 1).flatten(0, 1)
    EH = H @ E  # H is symmetric
    step = max(1, FEEDBACK_BLOCK // d) * d
    for _ in range(sweeps):
        changed = False
        for start in range(0, n, step):
            columns = slice(start, min(n, start + step))
            before, here = E[columns].clone(), EH[columns].clone()
            for k in range(start, columns.stop, d):
                vector, g = slice(k, k + d), k // d
                w_hat = x[vector] - E[vector]
                target[vector] = w_hat + inverse[g] @ here[k - start : k - start + d]
                new = search(target[vector], g)
                to_new, to_old = (metrics[g].T @ (w - target[vector]) for w in (words.index_select(1, new), w_hat))
                better = to_new.square().sum(0) < to_old.square().sum(0)
                index[g] = torch.where(better, new, index[g])
                moved = words.index_select(1, index[g]) - w_hat
                E[vector] -= moved
                here.addmm_(H[columns, vector], moved, alpha=-1)
                changed |= bool(better.any())
            EH.addmm_(H[:, columns], E[columns] - before)
        if not changed:
            break
    return index, target
