"""Checks of notebook 05: second moments, nearest codeword in a metric, error feedback from the first weight on."""

import torch

from .exercise import Wrong, exercise, expect_close

LEVELS = torch.tensor([-1.5, -0.5, 0.5, 1.5])


@exercise
def second_moment(answer):
    X = torch.tensor([[2.0, 1.0], [1.0, 2.0], [-2.0, -1.0], [-1.0, -2.0]])
    expect_close(answer(X), [[2.5, 2.0], [2.0, 2.5]], "H of the four tokens of section 1")
    X = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 2.0]])
    wanted = torch.tensor([[5.0, 2.0, 1.0], [2.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    got = answer(X)
    if torch.is_tensor(got) and got.shape == wanted.shape:
        centred = X - X.mean(0)
        if torch.allclose(got.float(), centred.T @ centred / 2, atol=1e-4):
            raise Wrong("That is the covariance. The layer is fed x itself: do not subtract its mean.")
    expect_close(got, wanted, "H of two tokens with three inputs whose mean is not zero")


@exercise
def nearest_in_metric(answer):
    words = torch.tensor([[1.0, 0.0], [0.0, 1.2]])
    t = torch.zeros(2)
    _expect_index(answer(t, words, torch.eye(2)), 0, "In the metric C_kk = I, the plain distance,")
    stretched = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    _expect_index(answer(t, words, stretched), 1, "Where errors of the first weight cost 16 times those of the second,")
    # From t, the gaps are (-1, 0) and (0, -1.2). C^T g has length 1 and 3.8 here; C g would have 3.2 and 1.2.
    sheared = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    _expect_index(answer(t, words, sheared), 0, "For a C_kk that is not symmetric (C_kk^T g, not C_kk g),")
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(16, 3, generator=generator)
    C = torch.randn(3, 3, generator=generator).tril()
    for t in torch.randn(20, 3, generator=generator):
        costs = [sum((C.T @ (t - word)) ** 2).item() for word in words]
        _expect_index(answer(t, words, C), costs.index(min(costs)), "Among 16 random codewords of 3 weights,")


@exercise
def feedback_from_the_front(answer):
    H = torch.tensor([[2.5, 2.0], [2.0, 2.5]])
    expect_close(answer(torch.tensor([0.9, 0.3]), H), [0.5, 0.5], "w = (0.9, 0.3) with the H of section 1")
    # The first goes to 0.5 and misses 0.4, so the second aims at 0.9 + 0.8 * 0.4 = 1.22.
    expect_close(
        answer(torch.tensor([0.9, 0.9]), H),
        [0.5, 1.5],
        "w = (0.9, 0.9): the second weight aims at 0.9 + 0.8 * 0.4, and the row",
    )
    lopsided = torch.tensor([[4.0, 1.0], [1.0, 1.0]])  # second makes up by H_12 / H_22 = 1, not H_12 / H_11 = 1/4
    expect_close(
        answer(torch.tensor([0.9, 0.8]), lopsided),
        [0.5, 1.5],
        "w = (0.9, 0.8) with H = [[4, 1], [1, 1]]: the second weight aims at 0.8 + 0.4, and the row",
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        inputs = torch.randn(30, 5, generator=generator) + torch.randn(30, 1, generator=generator)
        H, w = inputs.T @ inputs / 30, torch.randn(5, generator=generator)
        expect_close(answer(w.clone(), H.clone()), _front(w, H), "a random row of five weights")


def _front(w: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """By the definition: each weight aims at the minimum over the weights still to come, then is rounded."""
    w, H, w_hat = w.double(), H.double(), []
    for k in range(len(w)):
        if k:
            # Given the errors so far, let all weights from k on move freely: least loss by the normal equations.
            missing = w[:k] - torch.tensor(w_hat, dtype=torch.float64)
            move = -torch.linalg.solve(H[k:, k:], H[k:, :k] @ missing)
            target = w[k] - move[0]
        else:
            target = w[0]
        w_hat.append(LEVELS[(LEVELS - target).abs().argmin()].item())
    return torch.tensor(w_hat)


def _expect_index(got: object, wanted: int, where: str) -> None:
    try:
        got = int(got)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{where} the result is a {type(got).__name__}; one index is wanted.") from None
    if got != wanted:
        raise Wrong(f"{where} codeword {wanted} is the nearest; you chose {got}.")
