"""Quantizing whole models in place: what is replaced, what stays, and that a failure changes nothing.

Checked: every codebook and rotation on a Llama and on a GPT-2 (Conv1D, biases, tied embeddings); same
seed, same codes; feedback never loses to plain rounding; too few tokens, dead inputs, odd widths, zeros,
half precision; memory limits do not change the result; messages of everything that can be wrong.
"""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from kinds import KINDS, method
from torch import nn

from lcqat_min import TrainConfig, kl_to, train
from lcqat_min import codebook as cb
from lcqat_min.codebook.lloyd import fit, mean_squared_error
from lcqat_min.codebook.table import table_start
from lcqat_min.layer import rotation
from lcqat_min.layer.linear import AffineLinear, quant_layers
from lcqat_min.layer.trellis import TrellisLinear
from lcqat_min.packing.convert import pack_layers
from lcqat_min.ptq import lcqat
from lcqat_min.ptq import model as convert
from lcqat_min.ptq.method import ROTATIONS, Method, sample_vectors
from lcqat_min.ptq.model import quantize, weight_of
from lcqat_min.ptq.select import linear_layers
from lcqat_min.ptq.trellis import Trellis
from lcqat_min.qat.loop import parameter_groups
from lcqat_min.systems import free_vq
from lcqat_min.systems.free_vq import FreeVQ, TableLinear
from lcqat_min.systems.lsq import LSQ, StepLinear

BLOCK = ("layers.1", "h.1.", "lm_head")  # skip the second block: half the time
PAIR = (*BLOCK, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn", "c_fc")  # leaves two layers


REAL_CODEBOOK, REAL_TABLE = lcqat.normal_codebook, free_vq.normal_table


@lru_cache
def rough_codebook(kind: str, dim: int, seed: int, bits: float = 2.0) -> cb.Codebook:
    """Replaces `normal_codebook`, which takes seconds: the same kinds, hardly fitted."""
    if kind != "planes":
        return cb.scalar() if kind == "scalar" else cb.lattice(dim)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1500 if dim <= 4 else 200, dim, generator=generator, dtype=torch.float32)
    return fit(x, cb.random_planes(dim, generator, round(bits * dim)), rounds=8 if dim <= 4 else 2)


@lru_cache
def rough_table(dim: int, bits: int, seed: int) -> cb.TableCodebook:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1500, dim, generator=generator, dtype=torch.float32)
    return fit(x, table_start(x, 2**bits, generator), rounds=8)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lcqat, "normal_codebook", rough_codebook)
    monkeypatch.setattr(free_vq, "normal_table", rough_table)
    for module in (lcqat, free_vq):
        monkeypatch.setattr(module, "FIT_VECTORS", 256)


@pytest.fixture
def batches(generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randint(97, (2, 32), generator=generator) for _ in range(2)]


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.getfixturevalue(f"tiny_{request.param}")()


class OddNet(nn.Module):
    """Odd widths and dead inputs: 11 tokens -> 33 numbers, the last 3 of them never active -> 7 -> 11."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 33)
        self.embedding.weight.data[:, 30:] = 0
        self.first = nn.Linear(33, 7)
        self.second = nn.Linear(7, 11, bias=False)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> SimpleNamespace:
        return SimpleNamespace(logits=self.second(self.first(self.embedding(input_ids)).relu()))


@pytest.fixture
def odd_net() -> OddNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OddNet()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fingerprint(model: nn.Module) -> str:
    """A hash of all codes and of every number of the model."""
    digest = hashlib.sha256()
    for name, layer in quant_layers(model):
        digest.update(name.encode() + layer.indices().numpy().tobytes())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def names(model: nn.Module, skip: tuple[str, ...]) -> list[str]:
    """Linear layers by the name of their class, skipped ones left out."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and not any(part in name for part in skip)
    ]


def check_quantized(
    model: nn.Module, original: nn.Module, reports: list, config: Method, skip: tuple[str, ...] = ("lm_head",)
) -> None:
    """The right layers, near the old weights; every other module and number as it was."""
    wanted = names(original, skip)
    assert [report.name for report in reports] == wanted == [name for name, _ in quant_layers(model)]
    layer_type = {LSQ: StepLinear, FreeVQ: TableLinear, Trellis: TrellisLinear}.get(type(config), AffineLinear)
    for report in reports:
        layer, old = model.get_submodule(report.name), original.get_submodule(report.name)
        W = weight_of(old)
        assert type(layer) is layer_type
        assert report.shape == W.shape == layer.weight.shape
        assert 0 < report.loss < 0.3
        assert (layer.weight - W).square().sum() < 0.4 * W.square().sum()
        assert (layer.bias is None) == (getattr(old, "bias", None) is None)
        assert layer.bias is None or torch.equal(layer.bias, old.bias)
        assert (report.dead, report.tokens) == (0, 128)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in wanted:
            assert torch.equal(parameter, original.get_parameter(name))


@pytest.mark.parametrize("rotate", ROTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_codebook_and_rotation_on_two_architectures(model, batches, kind, rotate):
    config = method(kind, rotate=rotate)
    original = copy.deepcopy(model)
    reports = quantize(model, batches, config, skip=PAIR)
    assert [report.shape for report in reports] == [(32, 32), (32, 48)]
    check_quantized(model, original, reports, config, PAIR)
    assert torch.isfinite(model(input_ids=batches[0], use_cache=False).logits).all()


def test_all_layers_but_embeddings_head_and_norms(model, batches):
    original, modules = copy.deepcopy(model), dict(model.named_modules())
    embedding = model.get_input_embeddings().weight
    config = method(refits=0)
    reports = quantize(model, batches, config)
    assert len(reports) == {"LlamaForCausalLM": 14, "GPT2LMHeadModel": 8}[type(model).__name__]
    check_quantized(model, original, reports, config)
    assert model.get_input_embeddings().weight is embedding is model.get_output_embeddings().weight
    quantized = {report.name for report in reports}
    assert all(module is modules[name] for name, module in model.named_modules() if name not in quantized)


@pytest.mark.parametrize(("kind", "d"), [("lattice", 1), ("lattice", 8), ("planes", 2), ("planes", 8), ("table", 3)])
def test_other_vector_lengths(tiny_gpt2, batches, kind, d):
    model = tiny_gpt2()
    reports = quantize(model, batches, method(kind, dim=d), skip=PAIR)
    assert len(reports) == 2
    for report in reports:
        layer = model.get_submodule(report.name)
        assert layer.indices().shape == (report.shape[0], -(-report.shape[1] // d))
        assert report.loss < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_codes_whatever_the_global_generator(tiny_llama, batches, kind):
    prints = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 5)):
        model = tiny_llama()
        torch.manual_seed(global_seed)
        quantize(model, batches, method(kind, rotate="both"), skip=PAIR, seed=seed)
        prints.append(fingerprint(model))
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("kind", KINDS)
def test_feedback_never_loses_to_plain_rounding(tiny_llama, batches, kind):
    config = method(kind, rotate="input", refits=0)
    fed, plain = (quantize(tiny_llama(), batches, replace(config, feedback=f), skip=PAIR) for f in (True, False))
    assert all(f.loss <= p.loss for f, p in zip(fed, plain, strict=True))
    assert sum(f.loss for f in fed) < 0.9 * sum(p.loss for p in plain)


def test_an_expert_that_no_token_reaches_is_rounded_plainly(odd_net, batches):
    odd_net.spare = nn.Linear(8, 6)
    W = odd_net.spare.weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="no calibration token reached spare: rounded without error feedback"):
        reports = quantize(odd_net, [batch % 11 for batch in batches], method(rotate="none"))
    assert [report.tokens for report in reports] == [128, 128, 0]
    error = (odd_net.spare.weight - W).square().sum() / W.square().sum()
    assert reports[2].loss == pytest.approx(error.item(), rel=1e-4) and error < 0.2


def test_the_damping_asked_for_is_the_damping_used():
    H = torch.eye(8, dtype=torch.float64)
    for damping in (0.0, 0.05, 0.3):
        _, factor = method(damping=damping).prepare(torch.ones(2, 8), H, (None, None), 4)
        assert factor.damping == damping
        torch.testing.assert_close(factor.H, (1 + damping) * H.float())


def test_the_scale_of_a_row_maximum(tiny_llama, batches):
    model = tiny_llama()
    weights = {name: layer.weight.detach().clone() for name, layer in linear_layers(model, PAIR)}
    quantize(model, batches, method("step", rotate="none", scale="max", feedback=False), skip=PAIR)
    for name, layer in quant_layers(model):
        torch.testing.assert_close(layer.row_scale.detach(), weights[name].abs().amax(1) / 2)


def test_another_seed_fits_another_table(tiny_llama, batches):
    tables = []
    for seed in (0, 1):
        model = tiny_llama()
        quantize(model, batches, method("table", dim=2, rotate="none"), seed=seed, skip=PAIR)
        tables.append(next(layer for _, layer in quant_layers(model)).table.detach())
    assert not torch.equal(*tables)


def test_dead_inputs_are_counted_before_rotation(odd_net, batches):
    reports = quantize(odd_net, [batch % 11 for batch in batches], method(rotate="both"))
    assert reports[0].dead == 3


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


def test_a_linear_layer_that_computes_something_else_stays(odd_net, batches):
    odd_net.second = Scaled(7, 11, bias=False)
    assert [name for name, _ in linear_layers(odd_net)] == ["first"]
    quantize(odd_net, [batch % 11 for batch in batches], method())
    assert isinstance(odd_net.second, Scaled)


def test_autocast_does_not_reach_the_rounding(tiny_llama, batches):
    prints = []
    for enabled in (False, True):
        model = tiny_llama()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            quantize(model, batches, method(), skip=PAIR)
        prints.append(fingerprint(model))
    assert prints[0] == prints[1]


def test_weights_that_are_not_in_memory_are_named(odd_net, batches):
    odd_net.first = odd_net.first.to("meta")
    with pytest.raises(ValueError, match="weight of 'first' is not in memory"):
        quantize(odd_net, [batch % 11 for batch in batches], method())


def test_a_refit_never_raises_the_loss(tiny_llama, batches):
    config = method()
    none, one = (quantize(tiny_llama(), batches, replace(config, refits=refits), skip=PAIR) for refits in (0, 1))
    assert all(b.loss <= a.loss for a, b in zip(none, one, strict=True))
    assert sum(b.loss for b in one) < sum(a.loss for a in none)


@pytest.mark.parametrize("codebook", ["scalar", "planes"])
def test_fewer_tokens_than_inputs(tiny_llama, generator, codebook):
    few = [torch.randint(97, (1, 5), generator=generator)]
    for damping in (0.0, 0.01):
        model = tiny_llama()
        assert {report.tokens for report in quantize(model, few, method(codebook, damping=damping), skip=PAIR)} == {5}
        assert torch.isfinite(model(input_ids=few[0], use_cache=False).logits).all()


@pytest.mark.parametrize("kind", ["scalar", "lattice", "planes", "table"])
def test_odd_widths_and_inputs_that_are_never_active(odd_net, generator, kind):
    batches = [torch.randint(11, (3, 20), generator=generator)]
    for rotate in ROTATIONS:
        model = copy.deepcopy(odd_net)
        first, second = quantize(model, batches, method(kind, rotate=rotate))
        assert (first.name, first.shape, first.dead) == ("first", (7, 33), 3)  # padding is not counted
        assert (second.name, second.shape) == ("second", (11, 7))
        assert model.first.weight.shape == (7, 33)
        before, after = (m(input_ids=batches[0]).logits for m in (odd_net, model))
        assert (after - before).square().mean() < 0.3 * before.square().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_zeros_stays_finite(odd_net, generator, kind):
    odd_net.first.weight.data.zero_()
    quantize(odd_net, [torch.randint(11, (3, 20), generator=generator)], method(kind))
    assert all(torch.isfinite(tensor).all() for tensor in odd_net.state_dict().values())
    logits = odd_net(input_ids=torch.tensor([[1, 2]])).logits
    logits.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in odd_net.parameters())


def scaled(net: OddNet, weights: float, inputs: float) -> OddNet:
    """The same net, with the first layer and what it is fed multiplied by powers of four."""
    net = copy.deepcopy(net)
    net.first.weight.data.mul_(weights)
    net.embedding.weight.data.mul_(inputs)
    net.forward = lambda input_ids, use_cache=True: SimpleNamespace(
        logits=net.second(net.first(net.embedding(input_ids)).double().div(weights * inputs).float())
    )
    net.first.bias.data.zero_()
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_inputs_of_any_size_are_rounded_alike(odd_net, generator, kind):
    """Squares of 1e25 and of 1e-30 are beyond fp32, the numbers themselves are not."""
    batches = [torch.randint(11, (3, 20), generator=generator)]
    config = method(kind, dim=2)
    first, expected, codes = None, None, None
    for weights, inputs in ((1, 1), (4.0**42, 1), (4.0**-50, 1), (1, 4.0**40), (1, 4.0**-50), (4.0**42, 4.0**-50)):
        model = scaled(odd_net, weights, inputs)
        reports = quantize(model, batches, config)
        W, found = model.first.weight.detach().double() / weights, model.first.indices()
        if expected is None:
            first, expected, codes = reports[0], W, found
        assert reports[0] == first and first.loss > 0
        assert torch.equal(found, codes)
        torch.testing.assert_close(W, expected, rtol=1e-6, atol=0)


def test_what_is_beyond_fp32_once_rounded_is_named(odd_net, generator):
    odd_net.first.weight.data.fill_(3e38)
    odd_net.embedding.weight.data.mul_(1e-30)  # so that the next layer is fed finite numbers
    batches = [torch.randint(11, (3, 20), generator=generator)]
    fails_and_leaves_alone(odd_net, batches, r"'first' reaches 3e\+38, too much for fp32")


@pytest.mark.parametrize("size", [4.0**42, 4.0**-50])
def test_scales_of_any_size_train_in_their_own_unit(odd_net, generator, size):
    ids = torch.randint(11, (3, 20), generator=generator)
    rates = []
    for weights in (1, size):
        model = scaled(odd_net, weights, 1)
        quantize(model, [ids], method("scalar", rotate="none"))
        groups = {group["name"]: group["full_lr"] for group in parameter_groups(model, TrainConfig(1))}
        rates.append(groups["first.row_scale"] / weights)
    assert rates[0] == rates[1] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_get_fp32_layers(tiny_gpt2, batches, dtype):
    model = tiny_gpt2().to(dtype)
    quantize(model, batches, method(), skip=PAIR)
    for _, layer in quant_layers(model):
        assert layer.latent.dtype == layer.A.dtype == layer.row_scale.dtype == torch.float32
        assert layer.weight.dtype == torch.float32
    logits = model(input_ids=batches[0], use_cache=False).logits
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()


def test_a_copy_made_before_is_not_touched(tiny_llama, batches):
    model = tiny_llama()
    teacher = copy.deepcopy(model)
    before = state(teacher)
    quantize(model, batches, method(), skip=PAIR)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert same(state(teacher), before)
    assert not any(quant_layers(teacher))


def test_weights_used_in_two_places_stay(odd_net, generator):
    odd_net.third = nn.Linear(7, 11, bias=False)
    odd_net.third.weight = odd_net.second.weight
    assert [name for name, _ in linear_layers(odd_net)] == ["first"]
    with pytest.warns(RuntimeWarning, match="not quantized: second, third; their weight is used in two places"):
        quantize(odd_net, [torch.randint(11, (3, 20), generator=generator)], method())
    assert odd_net.third.weight is odd_net.second.weight


def test_the_head_stays_also_when_it_is_not_tied(tiny_llama):
    model = tiny_llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    assert len(list(linear_layers(model))) == 14
    assert len(list(linear_layers(model, skip=("mlp",)))) == 8


@pytest.mark.parametrize("learn", [True, False])
def test_one_table_for_the_model(tiny_gpt2, batches, learn):
    model = tiny_gpt2()
    quantize(model, batches, method("table", dim=2, learn_codebook=learn), skip=PAIR)
    assert len({id(layer.table) for _, layer in quant_layers(model)}) == 1
    assert sum(name.endswith(".table") for name, _ in model.named_parameters()) == 1
    assert {layer.table.requires_grad for _, layer in quant_layers(model)} == {learn}


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("kind", ["scalar", "lattice", "planes"])
def test_learn_codebook_decides_what_trains(tiny_gpt2, batches, kind, learn):
    model = tiny_gpt2()
    quantize(model, batches, method(kind, learn_codebook=learn), skip=PAIR)
    for _, layer in quant_layers(model):
        assert layer.A.requires_grad == layer.b.requires_grad == learn
        assert layer.latent.requires_grad
        assert layer.row_scale.requires_grad


def test_start_on_codes(tiny_gpt2, batches):
    latents = {}
    for on_codes in (True, False):
        model = tiny_gpt2()
        quantize(model, batches, method(start_on_codes=on_codes), skip=PAIR)
        latents[on_codes] = torch.cat([layer.latent.flatten() for _, layer in quant_layers(model)])
    assert set(latents[True].tolist()) == {-1.0, 1.0}
    assert torch.equal(latents[True] > 0, latents[False] > 0)  # the same codes
    assert len(set(latents[False].tolist())) > 100


def test_little_memory_takes_more_passes_to_the_same_result(tiny_llama, batches, monkeypatch):
    results = []
    for limit in (convert.MOMENTS_BYTES, 1):
        monkeypatch.setattr(convert, "MOMENTS_BYTES", limit)
        model, calls = tiny_llama(), []
        handle = model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        reports = quantize(model, batches, method("scalar"), skip=BLOCK)
        handle.remove()
        results.append((reports, fingerprint(model), len(calls)))
    assert results[0][:2] == results[1][:2]
    looks = 2  # for weights that are read or written elsewhere, in both modes
    assert (results[0][2], results[1][2]) == (len(batches) + looks, 7 * len(batches) + looks)


def test_progress_knows_its_end_and_modes_come_back(tiny_gpt2, batches):
    seen = []

    def progress(layers: Iterator) -> Iterator:
        seen.append(len(layers))
        return iter(layers)

    for training in (True, False):
        model = tiny_gpt2().train(training)
        quantize(model, batches, method("scalar"), skip=PAIR, progress=progress)
        assert model.training is training
    assert seen == [2, 2]


def fails_and_leaves_alone(
    model: nn.Module, batches: object, match: str, error: type = ValueError, skip: tuple[str, ...] = ()
) -> None:
    """quantize raises `error`; no number, module or hook of the model has changed."""
    before, modules = state(model), list(model.modules())
    with pytest.raises(error, match=match):
        quantize(model, batches, method("scalar"), skip=skip)
    after = state(model)
    assert all(torch.equal(before[name], after[name]) or before[name].isnan().any() for name in before)
    assert list(model.modules()) == modules
    assert not any(module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(tiny_llama, batches, bad):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = bad
    fails_and_leaves_alone(model, batches, r"'model\.layers\.1\.mlp\.up_proj' holds NaN or infinity")


def test_inputs_that_are_not_finite_name_the_layer(tiny_llama, batches):
    model = tiny_llama()
    model.model.layers[0].post_attention_layernorm.weight.data[0] = float("nan")
    fails_and_leaves_alone(model, batches, r"'model\.layers\.0\.mlp\.gate_proj' was fed NaN or infinity")


def test_an_error_in_the_last_layer_leaves_the_model_as_it_was(tiny_llama, batches, monkeypatch):
    real, count = lcqat.LCQAT.layer, []

    def breaks(*args: object) -> nn.Module:
        count.append(1)
        if len(count) == 14:
            raise MemoryError("full")
        return real(*args)

    monkeypatch.setattr(lcqat.LCQAT, "layer", breaks)
    fails_and_leaves_alone(tiny_llama(), batches, "full", MemoryError)
    assert len(count) == 14


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ([], "no calibration tokens"),
        ([torch.zeros(0, 8, dtype=torch.long)], "no calibration tokens"),
        (torch.zeros(4, 8, dtype=torch.long), r"torch.int64 \[8\].*windows.split\(8\)"),
        ([torch.zeros(2, 8)], r"torch.float32 \[2, 8\].*integers"),
        ([{"labels": torch.zeros(2, 8, dtype=torch.long)}], "is dict.*token ids"),
    ],
)
def test_wrong_batches(tiny_gpt2, wrong, match):
    fails_and_leaves_alone(tiny_gpt2(), wrong, match)


def test_quantizing_twice(tiny_gpt2, batches):
    model = tiny_gpt2()
    quantize(model, batches, method("scalar"))
    fails_and_leaves_alone(model, batches, "quantized already")


def test_a_model_without_linear_layers(odd_net, batches):
    fails_and_leaves_alone(odd_net, batches, "no linear layer.*first", skip=("first", "second"))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"kind": "vq"}, "codebook is 'vq'; choose one of scalar, lattice, planes$"),
        ({"rotate": True}, "rotate is True; choose one of none, input, both"),
        ({"estimator": "lsq"}, "estimator is 'lsq'; choose one of ste, clipped, dge"),
        ({"dim": 0}, "dim is 0.*1 to 8"),
        ({"dim": 9}, "dim is 9.*1 to 8"),
        ({"kind": "table", "dim": 5}, "dim is 5 and bits 2.0; their product, the bits of an index, must be"),
        ({"bits": 1.3}, "bits is 1.3 with codebook 'planes' and dim 4: planes take bits with"),
        ({"bits": 4.0, "dim": 8}, "bits is 4.0"),
        ({"kind": "lattice", "bits": 3.0}, "bits is 3.0 .* the others 2"),
        ({"sweeps": -1}, "sweeps -1"),
        ({"kind": "step", "scale": "min"}, "scale is 'min'; choose one of search, max"),
        ({"damping": -0.1}, "damping is -0.1"),
        ({"damping": 1.0}, "damping is 1.0"),
        ({"refits": -1}, "refits -1"),
    ],
)
def test_wrong_settings(wrong, match):
    with pytest.raises(ValueError, match=match):
        method(**wrong)


def test_a_text_instead_of_several_names_to_skip(tiny_gpt2, batches):
    fails_and_leaves_alone(tiny_gpt2(), batches, r"give a tuple: \('lm_head',\)", skip="lm_head")


def test_the_start_of_every_fit_beats_the_scalar_grid():
    real = REAL_CODEBOOK.__wrapped__
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(1))
    scalar = mean_squared_error(x.flatten()[:, None], real("scalar", 1, 0))
    for book in (real("planes", 2, 0), REAL_TABLE.__wrapped__(2, 4, 0)):
        assert mean_squared_error(x, book) < 0.96 * scalar


def test_the_error_of_padding_does_not_count():
    X = torch.randn(200, 33, generator=torch.Generator().manual_seed(0)).double()
    W, factor = method(rotate="none").prepare(torch.ones(2, 33), X.T @ X / 200, (None, None), 4)
    assert W.shape == (2, 36) and (W[:, 33:] == 0).all()
    weights = factor.H.diagonal()
    assert factor.dead == 0 and (weights[33:] < 0.02 * weights[:33].mean()).all()


def test_the_codebook_is_fitted_to_vectors_from_all_columns():
    d, groups = 4, 256
    W = torch.arange(groups).repeat_interleave(d).repeat(64, 1) + 1.0  # every vector tells its place in the row
    for count in (1, 100, 1024, 4096, 10**6):
        x = sample_vectors(W, d, count)
        assert len(x) == min(count, 64 * groups)
        assert len(x.unique(dim=0)) > 0.6 * min(len(x), groups)


def test_a_model_that_was_quantized_in_inference_mode_can_be_trained(tiny_llama, batches):
    model = tiny_llama()
    with torch.inference_mode():
        quantize(model, batches, method(), skip=PAIR)
    model(input_ids=batches[0]).logits.sum().backward()
    assert all(layer.latent.grad is not None for _, layer in quant_layers(model))


def whole_path(model: nn.Module, batches: list[torch.Tensor], config: Method) -> list[torch.Tensor]:
    """All that comes out of it: quantized, trained for a step, measured, packed; nothing that was kept is used."""
    rotation.KEPT.clear()
    teacher = copy.deepcopy(model)
    losses = [report.loss for report in quantize(model, batches, config)]
    losses += [row["loss"] for row in train(model, batches, TrainConfig(1), teacher)]
    for name, layer in pack_layers(model).items():
        model.set_submodule(name, layer)
    losses.append(kl_to(teacher, model, batches[0].flatten(), window=4))
    outputs = [model(input_ids=ids).logits for ids in (batches[0], batches[0][:1, :1], batches[0][:1, :4])]
    return [torch.tensor(losses, dtype=torch.float64), *outputs, *model.state_dict().values()]


@pytest.mark.parametrize(
    ("kind", "d", "more"),
    [
        ("scalar", 1, ""),
        ("step", 1, "max"),
        ("lattice", 4, ""),
        ("planes", 4, ""),
        ("planes", 3, ""),
        ("planes", 8, ""),
        ("table", 2, ""),
    ],
)
def test_the_default_dtype_does_not_matter(odd_net, batches, kind, d, more):
    batches, config = [batch % 11 for batch in batches], method(kind, dim=d, refits=0)
    if more == "max":  # one scale per row: the search takes long
        config = replace(config, scale="max")
    expected = whole_path(copy.deepcopy(odd_net), batches, config)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        try:
            torch.set_default_dtype(dtype)
            found = whole_path(copy.deepcopy(odd_net), batches, config)
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(expected, found, strict=True)), dtype


def test_the_start_of_every_fit_is_the_same_for_every_default_dtype(monkeypatch):
    for module in (lcqat, free_vq):
        monkeypatch.setattr(module, "fit", lambda x, start, rounds: start)
    monkeypatch.setattr(lcqat, "STARTS", 1)
    real, table = REAL_CODEBOOK.__wrapped__, REAL_TABLE.__wrapped__
    for start in (lambda: real("planes", 2, 0), lambda: real("planes", 4, 0), lambda: table(2, 4, 0)):
        expected = start()
        try:
            torch.set_default_dtype(torch.bfloat16)
            assert torch.equal(start().codewords(), expected.codewords())
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("config", [{"vocab_size": 97}, "a name", None])
def test_models_with_a_config_of_their_own_kind(config):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.embed, self.linear = config, torch.nn.Embedding(97, 32), torch.nn.Linear(32, 97)

        def forward(self, input_ids, use_cache=False):
            return self.linear(self.embed(input_ids))

    model = Plain()
    assert [report.name for report in quantize(model, [torch.arange(48).view(2, 24)], method())] == ["linear"]
    assert model.config == config
