"""Second moments and their factor against loops in float64 that follow the definitions, one token at a time.

Checked: second moments token by token, what is shared and what is restored; the damped factor of easy, singular and
dead second moments; error messages.
"""

import pytest
import torch
from torch import Tensor, nn

from lcqat_min.ptq.moments import factorize, second_moments

BATCHES = [torch.arange(14).view(2, 7), torch.arange(40, 55).view(3, 5)]  # 29 tokens


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moments_of(n: int, seed: int, tokens: int = 200) -> Tensor:
    """fp64 [n, n]: second moments of inputs of which neighbours are alike and some are large."""
    X = torch.randn(tokens, n, generator=seeded(seed), dtype=torch.float64)
    X[:, 1:] += 0.8 * X[:, :-1]
    X[:, :: max(1, n // 3)] *= 3
    return X.T @ X / tokens


# Second moments ----------------------------------------------------------------------------------


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def inputs_of(model: nn.Module, layer: nn.Module) -> list[Tensor]:
    """What the layer is fed in BATCHES: one fp64 vector per token."""
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        for batch in BATCHES:
            model(input_ids=batch)
    handle.remove()
    return [token.double() for x in seen for token in x.flatten(0, 1)]


def test_second_moments_token_by_token(tiny_llama):
    model = tiny_llama()
    layers = linears(model)
    moments = second_moments(model, layers, BATCHES)
    assert list(moments) == list(layers) and len(layers) == 14
    for name, layer in layers.items():
        tokens = inputs_of(model, layer)
        by_hand = sum(torch.outer(x, x) for x in tokens) / len(tokens)
        assert moments[name].tokens == len(tokens) == 29
        assert moments[name].H.dtype == torch.float64
        torch.testing.assert_close(moments[name].H, by_hand, rtol=1e-10, atol=1e-12)


class Chain(nn.Module):
    """Two layers on one tensor; `change` may alter it in place or replace it between them."""

    def __init__(self, change):
        super().__init__()
        self.first, self.second, self.change = nn.Linear(3, 3), nn.Linear(3, 3), change

    def forward(self, input_ids, use_cache):
        x = torch.nn.functional.one_hot(input_ids, 3).float()
        self.first(x)
        self.second(input=self.change(x))


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.mul_(2), lambda x: x * 2 if len(x) == 1 else x])
def test_second_moments_of_layers_that_share_their_input_at_times(change):
    model, batches = Chain(change), [torch.tensor([[0, 1, 1]]), torch.tensor([[0, 2], [1, 2]])]
    moments = second_moments(model, {"first": model.first, "second": model.second}, batches)
    for name, factor in (("first", lambda x: x), ("second", change)):
        x = [factor(torch.nn.functional.one_hot(batch, 3).float()).flatten(0, 1).double() for batch in batches]
        by_hand = sum(part.T @ part for part in x) / 7
        torch.testing.assert_close(moments[name].H, by_hand)


def test_second_moments_do_not_depend_on_the_order_of_the_names(tiny_llama):
    model = tiny_llama()
    layers = linears(model)
    moments = second_moments(model, layers, BATCHES)
    other = second_moments(model, dict(reversed(layers.items())), BATCHES)
    assert all(torch.equal(moments[name].H, other[name].H) for name in layers)


def test_second_moments_leave_the_model_as_it_was(tiny_llama):
    for training in (True, False):
        model = tiny_llama().train(training)
        before = {name: p.clone() for name, p in model.named_parameters()}
        second_moments(model, linears(model), BATCHES)
        assert all(module.training == training for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_hooks_are_removed_after_a_failure(tiny_llama):
    model = tiny_llama()
    with pytest.raises(IndexError):
        second_moments(model, linears(model), [*BATCHES, torch.tensor([[10_000]])])
    assert not any(module._forward_pre_hooks for module in model.modules()) and model.training


def test_second_moments_of_nothing(tiny_llama):
    model = tiny_llama()
    with pytest.raises(ValueError, match="no batches; give at least one batch of token ids"):
        second_moments(model, linears(model), [])


class Expert(nn.Module):
    """Feeds the tokens whose number is odd to one layer, and none to the other."""

    def __init__(self):
        super().__init__()
        self.embedding, self.odd, self.never = nn.Embedding(60, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x = self.embedding(input_ids)
        return self.odd(x[input_ids % 2 == 1]).sum() + self.never(x[input_ids < 0]).sum()


def test_layers_that_no_token_reaches_are_left_out():
    model = Expert()
    moments = second_moments(model, {"odd": model.odd, "never": model.never}, [*BATCHES, torch.tensor([[2, 4]])])
    odd = torch.cat([batch[batch % 2 == 1] for batch in BATCHES])
    X = model.embedding.weight.detach().double()[odd]
    assert list(moments) == ["odd"] and moments["odd"].tokens == len(odd) == 14
    torch.testing.assert_close(moments["odd"].H, X.T @ X / 14)


def test_calibration_runs_in_evaluation_mode():
    model = nn.Sequential()
    model.embedding, model.drop, model.linear = nn.Embedding(9, 4), nn.Dropout(0.5), nn.Linear(4, 4)
    model.forward = lambda input_ids, use_cache: model.linear(model.drop(model.embedding(input_ids)))
    first, again = (second_moments(model, {"linear": model.linear}, [torch.arange(9)[None]]) for _ in range(2))
    assert torch.equal(first["linear"].H, again["linear"].H) and model.drop.training


def test_second_moments_that_are_not_finite_name_the_layer(tiny_llama):
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"'model.layers.1.self_attn.q_proj' was fed NaN or infinity"):
        second_moments(model, linears(model), BATCHES)


# Factor ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
def test_factor_of_an_easy_matrix(damping):
    H = moments_of(12, seed=3)
    factor = factorize(H, damping)
    damped = H + damping * H.diagonal().mean() * torch.eye(12)
    assert factor.damping == damping and factor.dead == 0
    assert factor.H.dtype == torch.float32 and factor.C.dtype == torch.float64
    assert torch.equal(factor.C, factor.C.tril())
    torch.testing.assert_close(factor.C @ factor.C.T, damped)
    torch.testing.assert_close(factor.H, damped.float())


def singular_moments(why: str) -> Tensor:
    X = torch.randint(-3, 4, (40, 12), generator=seeded(4)).double()
    if why == "few tokens":
        X = X[:5]
    else:
        X[:, 7] = X[:, 2]
    return X.T @ X


@pytest.mark.parametrize("why", ["few tokens", "doubled channel"])
def test_damping_rises_until_singular_moments_have_a_factor(why):
    H = singular_moments(why)
    assert torch.linalg.matrix_rank(H) < 12
    factor = factorize(H, damping=0.0)
    assert 1e-6 <= factor.damping <= 1e-4
    damped = H + factor.damping * H.diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(factor.C @ factor.C.T, damped)
    assert factorize(H).damping == 0.01  # the default is enough


def test_damping_rises_tenfold_and_is_reported():
    factor = factorize(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))  # its least eigenvalue is -2
    assert factor.damping == pytest.approx(10)
    torch.testing.assert_close(factor.H, torch.tensor([[11.0, 3.0], [3.0, 11.0]]))


def test_dead_inputs_get_the_mean_of_the_others():
    H = moments_of(6, seed=5)
    alive = [0, 1, 3, 5]
    H[[2, 4]] = 0
    H[:, [2, 4]] = 0
    mean = H.diagonal()[alive].mean()
    factor = factorize(H, damping=0.1)
    assert factor.dead == 2
    expected = H + 0.1 * mean * torch.eye(6)
    expected[[2, 4], [2, 4]] += mean
    torch.testing.assert_close(factor.C @ factor.C.T, expected)


def test_moments_of_zeros_count_all_inputs_as_dead():
    factor = factorize(torch.zeros(3, 3))
    assert factor.dead == 3
    torch.testing.assert_close(factor.H, 1.01 * torch.eye(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_factorize_refuses_what_is_not_finite(bad):
    H = torch.eye(3)
    H[1, 0] = bad
    with pytest.raises(ValueError, match="second moments hold NaN or infinity, or numbers beyond fp32"):
        factorize(H)


def test_factorize_refuses_what_fp32_cannot_hold():
    with pytest.raises(ValueError, match="numbers beyond fp32"):
        factorize(1e200 * torch.eye(3, dtype=torch.float64))
