"""Checks of notebook 06: straight-through by detach, gradients of a codebook, the walk to a flip, stuck parameters."""

import torch
from torch import nn

from lcqat_min.layer.surrogate import slope

from .exercise import Wrong, exercise, expect_close


@exercise
def ste_by_detach(answer):
    u = torch.tensor([-1.3, 0.2, 1.2, 2.6, 4.2], requires_grad=True)
    q = answer(u, 3)
    forward = q.detach() if torch.is_tensor(q) else q
    expect_close(forward, [0.0, 0, 1, 3, 3], "q for u = -1.3, 0.2, 1.2, 2.6, 4.2, top 3,")
    expect_close(answer(u, 1).detach(), [0.0, 0, 1, 1, 1], "q for the same u and top 1")
    if not q.requires_grad:
        raise Wrong("No gradient reaches u: too much is detached. Detach only what you add to u.")
    (q * torch.tensor([1.0, 2, 3, 4, 5])).sum().backward()
    if u.grad is None or not u.grad.any():
        raise Wrong("The gradient is zero: that is rounding's own. Let u itself pass, outside detach().")
    if not u.grad[[0, 4]].any():
        raise Wrong("Outside the grid the gradient is zero, as in the clipped one: clip inside detach(), too.")
    expect_close(u.grad, [1.0, 2, 3, 4, 5], "the gradient of u when dL/dq is 1, 2, 3, 4, 5")


@exercise
def vector_gradients(answer):
    A = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    q, g = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 1.0]])
    by_hand = [[2.0, -2.0], [1.0, -1.0]], [2.0, 1.0], [[2.0, 2.0]]
    _expect_three(answer(A, q, g), by_hand, "for the vector of section 5")
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 5, generator=generator)
    q, g = torch.randn(7, 5, generator=generator).sign(), torch.randn(7, 3, generator=generator)
    dA, dq = torch.zeros(3, 5), torch.zeros(7, 5)
    for n in range(7):
        dA += torch.outer(g[n], q[n])
        dq[n] = A.T @ g[n]
    _expect_three(answer(A, q, g), (dA, g.sum(0), dq), "for 7 vectors of 3 weights and 5 digits")


@exercise
def walk_to_flip(answer):
    cases = [
        (1.2, -1.0, 0.08, "ste"),
        (1.2, 1.0, 0.08, "ste"),
        (1.0, -1.0, 0.08, "dge"),
        (1.45, -1.0, 0.01, "dge"),
        (3.8, 1.0, 0.08, "clipped"),
        (3.8, 1.0, 0.08, "ste"),
        (2.0, -2.0, 0.03, "clipped"),
        (2.9, -1.0, 0.1, "ste"),
    ]
    for case in cases:
        got, wanted = answer(*case), _steps(*case)
        where = "from u = {}, with gradient {}, rate {} and {!r}".format(*case)
        if wanted is None and got is not None:
            raise Wrong(f"{where} the code never changes in 1000 steps: None is wanted, you return {got}.")
        if got != wanted:
            off = " Count the step that flips it, too." if got == wanted - 1 else ""
            raise Wrong(f"{where} the code changes at step {wanted}; you return {got}.{off}")


@exercise
def stuck_parameters(answer):
    x = torch.ones(2, 3)
    module = _Leaky()
    _expect_names(answer(module, x), {"rounded", "detached"}, "A module with a rounded and a detached parameter")
    module.detached.grad = torch.ones(3)  # left over from an earlier loss
    _expect_names(answer(module, x), {"rounded", "detached"}, "The same module with an old gradient lying around")
    _expect_names(answer(nn.Linear(3, 2), x), set(), "nn.Linear")


class _Leaky(nn.Module):
    """One parameter that learns, two that cannot, and one that is frozen on purpose."""

    def __init__(self):
        super().__init__()
        self.learns = nn.Parameter(torch.tensor([0.5, 0.0, -0.5]))
        self.rounded = nn.Parameter(torch.tensor([0.7, 1.2, 2.2]))
        self.detached = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        return x * (self.learns + self.rounded.round() + self.detached.detach() + self.frozen)


def _steps(u, gradient, rate, estimator):
    start = min(max(round(u), 0), 3)
    for step in range(1, 1001):
        u -= rate * gradient * slope(torch.tensor(u), 3, estimator).item()
        if min(max(round(u), 0), 3) != start:
            return step
    return None


def _expect_three(got, wanted, where):
    if not isinstance(got, (tuple, list)) or len(got) != 3:
        raise Wrong(f"{where} three results are wanted: dL/dA, dL/db and dL/dq.")
    for name, one, other in zip(("dL/dA", "dL/db", "dL/dq"), got, wanted, strict=True):
        expect_close(one, other, f"{name} {where}")


def _expect_names(got, wanted, where):
    try:
        got = set(got)
    except TypeError:
        raise Wrong(f"{where}: a set of names is wanted, not a {type(got).__name__}.") from None
    if missing := wanted - got:
        raise Wrong(f"{where}: you miss {', '.join(sorted(missing))}.")
    if extra := got - wanted:
        raise Wrong(f"{where}: {', '.join(sorted(map(str, extra)))} should not be listed.")
