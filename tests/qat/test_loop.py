"""The training loop: where it starts, what it moves and by how much, and that it can be stopped and trusted.

Checked: the first loss is that of the quantized model; every trainable number gets a gradient and moves, no other
does; one step is its rate in units; an interrupted run ends bit by bit like an uninterrupted one, also from another
start, as the file is the truth; damaged checkpoints and those of other runs, bad numbers and bad arguments are refused
by name and change nothing; autocast, gradient checkpointing, accelerate.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kinds import KINDS, method
from safetensors.torch import load_file, save_file
from torch import nn

from lcqat_min.harness.evaluate import kl_to
from lcqat_min.layer.linear import quant_layers
from lcqat_min.ptq.model import quantize
from lcqat_min.qat.config import TrainConfig
from lcqat_min.qat.loop import parameter_groups, train
from lcqat_min.qat.loss import distillation_loss

Pair = tuple[nn.Module, nn.Module]  # the unquantized model and its quantized copy


@pytest.fixture(scope="session")
def pair(tiny_llama: Callable[..., nn.Module]) -> Callable[..., Pair]:
    """`pair(kind, **settings)`: fresh copies of a tiny Llama and of the same, its first block quantized."""
    made: dict[tuple, Pair] = {}
    ids = torch.randint(97, (4, 32), generator=torch.Generator().manual_seed(1))

    def make(kind: str = "planes", seed: int = 0, **settings: object) -> Pair:
        key = (kind, seed, *settings.items())
        if key not in made:
            teacher = tiny_llama().eval()
            model = copy.deepcopy(teacher)
            config = method(kind, dim=2, **settings)
            quantize(model, [ids], config, skip=("layers.1", "lm_head"), seed=seed)
            made[key] = teacher, model
        return copy.deepcopy(made[key])

    return make


def stream(seed: int = 0) -> Iterator[torch.Tensor]:
    """Endless batches [2, 16] of random tokens, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(97, (2, 16), generator=generator)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- where it starts, what it moves -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_that_of_the_quantized_model(pair, kind):
    teacher, model = pair(kind)
    ids, losses = next(stream()), []
    expected = kl_to(teacher, model, ids.flatten(), window=16)
    assert expected > 0.01
    train(model, [ids], TrainConfig(1), teacher, on_step=lambda step, loss: losses.append(loss))
    assert losses == [pytest.approx(expected, abs=1e-4)]


def test_without_a_teacher_the_loss_is_that_of_the_next_token(pair):
    _, model = pair()
    ids, losses = next(stream()), []
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    train(model, [ids], TrainConfig(1), on_step=lambda step, loss: losses.append(loss))
    assert losses == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trainable_moves_and_nothing_else(pair, kind, learn):
    teacher, model = pair(kind, learn_codebook=learn)
    model.model.layers[1].mlp.requires_grad_(False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    named = {
        "scalar": {"latent", "A", "b"},
        "lattice": {"latent", "A", "b"},
        "planes": {"latent", "A", "b"},
        "trellis": {"latent", "taps"},
        "step": {"latent"},
        "table": {"table"},
    }[kind] | {"row_scale", "col_scale"}
    layer = "model.layers.0.self_attn.q_proj"
    frozen = set() if learn else {"A", "b", "table", "taps"}
    assert {name.rpartition(".")[2] for name in trainable if name.startswith(layer)} == named - frozen

    ids = next(stream())
    distillation_loss(model(input_ids=ids, use_cache=False).logits, teacher(input_ids=ids).logits).backward()
    for name, parameter in model.named_parameters():
        if name in trainable:
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    before = state(model)
    train(model, stream(), TrainConfig(3), teacher)
    changed = {name for name, now in state(model).items() if not torch.equal(now, before[name])}
    assert {name for name, _ in model.named_parameters() if name in changed} == trainable
    assert not changed & {name for name, _ in model.named_buffers()}


@pytest.mark.parametrize("kind", KINDS)
def test_training_brings_the_model_nearer_to_its_teacher(pair, kind):
    teacher, model = pair(kind)
    ids = next(stream())
    before = kl_to(teacher, model, ids.flatten(), window=16)
    start = {name: layer.indices() for name, layer in quant_layers(model)}
    history = train(model, [ids] * 30, TrainConfig(30, lr_latents=0.03), teacher)
    assert kl_to(teacher, model, ids.flatten(), window=16) < 0.6 * before
    flipped = sum((layer.indices() != start[name]).sum().item() for name, layer in quant_layers(model))
    assert history[-1]["flips"] == flipped / sum(index.numel() for index in start.values())
    assert (flipped > 0) == (kind != "table")


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_the_rate_in_units_of_each_group(pair, kind):
    teacher, model = pair(kind)
    rates = {"lr_latents": 0.03, "lr_scales": 2e-3, "lr_codebooks": 3e-3, "lr_rest": 4e-4}
    config = TrainConfig(1, **rates, warmup=0, decay=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    units = {f"{name}.latent": layer.units()["latent"][1] for name, layer in quant_layers(model) if kind != "table"}
    train(model, stream(), config, teacher)
    for name, p in model.named_parameters():
        moved, last = (p - before[name]).abs().median().item(), name.rpartition(".")[2]
        size = before[name[:-1] + "A" if last == "b" else name].square().mean().sqrt().item()
        expected = {
            "latent": 0.03 * units.get(name, 0),
            "row_scale": 2e-3 * size,
            "col_scale": 2e-3 * size,
            "A": 3e-3 * size,
            "b": 3e-3 * size,
            "table": 3e-3 * size,
            "taps": 3e-3 * size,
        }.get(last, 4e-4)
        if name.endswith("embed_tokens.weight"):  # most tokens were not seen, but all are predicted
            assert (p - before[name]).abs().max().item() == pytest.approx(expected, rel=0.02)
        assert moved == pytest.approx(expected, rel=0.02), name


def test_a_bin_is_one_on_a_grid_two_between_bits_and_the_step_where_it_is_learned(pair):
    units = {}
    for kind in ("scalar", "lattice", "planes", "trellis", "step"):
        _, layer = quant_layers(pair(kind)[1])[0]
        units[kind] = layer.units()["latent"]
    step = pytest.approx(layer.row_scale.mean().item())
    bins = {"scalar": 1, "lattice": 1, "planes": 2, "trellis": 2, "step": step}
    assert units == {kind: ("latents", size) for kind, size in bins.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_tensor_is_in_one_group(pair, kind):
    _, model = pair(kind)
    groups = parameter_groups(model, TrainConfig(1))
    assert [group["name"] for group in groups] == [name for name, _ in model.named_parameters()]
    kinds = {
        "latent": "latents",
        **dict.fromkeys(("row_scale", "col_scale"), "scales"),
        **dict.fromkeys(("A", "b", "table", "taps"), "codebooks"),
    }
    for group in groups:
        assert group["group"] == kinds.get(group["name"].rpartition(".")[2], "rest")
        assert group["full_lr"] > 0


def test_rows_of_the_history(pair):
    teacher, model = pair("planes")
    before, losses = {name: p.detach().clone() for name, p in model.named_parameters()}, []
    config = TrainConfig(7, log_every=3, lr_latents=0.1, log_movement=True)
    history = train(model, stream(), config, teacher, on_step=lambda step, loss: losses.append(loss))
    assert [row["step"] for row in history] == [3, 6, 7]
    assert [row["tokens"] for row in history] == [96, 192, 224]
    assert [row["rate"] for row in history] == [config.rate(step) for step in (2, 5, 6)]
    assert [row["loss"] for row in history] == [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]]
    moved = torch.cat(
        [(p.detach() - before[name]).flatten() for name, p in model.named_parameters() if name.endswith("latent")]
    )
    assert history[-1]["moved_latents"] == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-5)
    for row in history:
        assert all(
            row[f"{what}_{kind}"] > 0
            for what in ("grad", "moved")
            for kind in ("latents", "scales", "codebooks", "rest")
        )
    keys = train(pair("planes")[1], stream(), TrainConfig(1), teacher)[0].keys()
    assert {"flips", "grad_rest"} < keys and not any(key.startswith("moved") for key in keys)


def test_a_teacher_is_evaluated_and_not_changed(tiny_gpt2, generator):
    teacher = tiny_gpt2()
    model = copy.deepcopy(teacher)
    ids = torch.randint(97, (2, 16), generator=generator)
    quantize(model, [ids], method("scalar"), skip=("h.1.", "lm_head"))
    expected, before, losses = kl_to(teacher, model, ids.flatten(), window=16), state(teacher), []
    for module in teacher.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    train(model, [ids], TrainConfig(1), teacher.train(), on_step=lambda step, loss: losses.append(loss))
    assert losses == [pytest.approx(expected, abs=1e-4)]
    assert same(state(teacher), before)
    assert all(p.grad is None for p in teacher.parameters())


def test_vocabularies_must_agree(pair):
    teacher, model = pair()
    teacher.resize_token_embeddings(90)
    with pytest.raises(ValueError, match="vocabulary: 97 and 90 logits"):
        train(model, [torch.zeros(1, 4, dtype=torch.long)], TrainConfig(1), teacher)


# --- stop and resume ----------------------------------------------------------------------------------------

RUN = TrainConfig(9, log_every=4, checkpoint_every=3, lr_latents=0.1)  # checkpoints fall between rows


class Stop(Exception):
    pass


def stop_after(last: int) -> Callable[[int, float], None]:
    def on_step(step: int, loss: float) -> None:
        if step == last:
            raise Stop

    return on_step


@pytest.mark.parametrize("kind", ["planes", "step", "table"])
def test_a_resumed_run_is_bit_by_bit_the_uninterrupted_one(pair, tmp_path, kind):
    teacher, model = pair(kind)
    expected_history = train(model, stream(), RUN, teacher)
    expected = state(model)
    path = tmp_path / "new" / "run.safetensors"
    for last in (1, 4, 7):  # before the first checkpoint, after it, after the second
        _, model = pair(kind)
        with pytest.raises(Stop):
            train(model, stream(), RUN, teacher, checkpoint=path, on_step=stop_after(last))
        assert path.exists() == (last > 1)
    _, model = pair(kind)
    seen = []
    history = train(model, stream(), RUN, teacher, checkpoint=path, on_step=lambda step, _: seen.append(step))
    assert seen == [6, 7, 8]
    assert history == expected_history
    assert same(state(model), expected)
    assert [file.name for file in path.parent.iterdir()] == [path.name]

    _, model = pair(kind)  # a finished run needs no batches
    assert train(model, [], RUN, teacher, checkpoint=path) == expected_history
    assert same(state(model), expected)


def refused(model: nn.Module, teacher: nn.Module, config: TrainConfig, path: Path, match: str) -> None:
    before, content = state(model), path.read_bytes()
    with pytest.raises(ValueError, match=match):
        train(model, stream(), config, teacher, checkpoint=path)
    assert same(state(model), before)
    assert path.read_bytes() == content


def test_checkpoints_of_other_runs_are_refused(pair, tmp_path):
    path = tmp_path / "run.safetensors"
    teacher, trained = pair("planes")
    train(trained, stream(), RUN, teacher, checkpoint=path)
    other_run = r"run\.safetensors is the checkpoint of another run.*delete it"
    refused(pair("planes")[1], teacher, replace(RUN, lr_latents=0.2), path, other_run)
    refused(pair("step")[1], teacher, RUN, path, other_run)
    refused(pair("planes", learn_codebook=False)[1], teacher, RUN, path, other_run)
    refused(pair("planes", rotate="none")[1], teacher, RUN, path, other_run)  # without signs
    refused(pair("planes")[1], None, RUN, path, other_run)  # another loss
    save_file({"weight": torch.ones(3)}, path)
    refused(pair("planes")[1], teacher, RUN, path, other_run)


@pytest.mark.parametrize("kind", ["planes", "table"])
def test_the_file_is_the_truth_for_a_model_of_the_same_shape(pair, tmp_path, kind):
    """From other signs, frozen codebooks and indices, scales and latents the run still ends bit by bit as it began."""
    config, path = replace(RUN, log_movement=True), tmp_path / "run.safetensors"
    teacher, model = pair(kind, learn_codebook=False)
    expected = train(model, stream(), config, teacher)
    stopped, other = pair(kind, learn_codebook=False)[1], pair(kind, learn_codebook=False, seed=3)[1]
    with pytest.raises(Stop):
        train(stopped, stream(), config, teacher, checkpoint=path, on_step=stop_after(5))
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2)
    assert not same(state(other), state(pair(kind, learn_codebook=False)[1]))
    assert train(other, stream(), config, teacher, checkpoint=path) == expected
    assert same(state(other), state(model))


def test_a_checkpoint_holds_no_copy_of_the_start_unless_movement_is_logged(pair, tmp_path):
    path, sizes = tmp_path / "run.safetensors", {}
    for logged in (False, True):
        teacher, model = pair("planes")
        path.unlink(missing_ok=True)
        train(model, stream(), replace(RUN, log_movement=logged), teacher, checkpoint=path)
        sizes[logged] = sum(tensor.nbytes for name, tensor in load_file(path).items() if name.startswith("start."))
    indices = [layer.indices() for _, layer in quant_layers(model)]
    assert sizes[False] == sum(index.numel() for index in indices)  # one byte each
    assert sizes[True] - sizes[False] == sum(p.nbytes for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"\xff" * 64, lambda data: b""])
def test_a_damaged_checkpoint_says_so(pair, tmp_path, damage):
    path = tmp_path / "run.safetensors"
    teacher, model = pair("planes")
    train(model, stream(), RUN, teacher, checkpoint=path)
    path.write_bytes(damage(path.read_bytes()))
    refused(pair("planes")[1], teacher, RUN, path, r"run\.safetensors is .*damaged.*: delete it to start again")


def test_a_checkpoint_that_could_not_be_written_is_named_before_the_first_step(pair, tmp_path, monkeypatch):
    teacher, model = pair("planes")
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now raises ImportError
    before = state(model)
    with pytest.raises(ImportError, match="needs safetensors: `pip install safetensors`"):
        train(model, stream(), RUN, teacher, checkpoint=tmp_path / "run.safetensors")
    assert same(state(model), before)
    train(model, stream(), TrainConfig(1), teacher)


def test_a_half_written_file_is_ignored_and_a_home_is_found(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = tmp_path / "run.safetensors"
    path.with_name(path.name + ".part").mkdir()
    (path.with_name(path.name + ".part") / ".tmp").write_bytes(b"half")
    teacher, model = pair("planes")
    history = train(model, stream(), RUN, teacher, checkpoint=Path("~") / path.name)
    _, plain = pair("planes")
    assert history == train(plain, stream(), RUN, teacher)
    assert same(state(model), state(plain))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_gradients_of_an_earlier_run_do_not_count(pair):
    teacher, model = pair("planes")
    _, other = pair("planes")
    for parameter in other.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    assert train(model, stream(), TrainConfig(2), teacher) == train(other, stream(), TrainConfig(2), teacher)
    assert same(state(model), state(other))


# --- what can go wrong --------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_layer(pair):
    teacher, model = pair("planes")
    model.eval()

    def poison(step: int, loss: float) -> None:
        if step == 2:
            model.model.layers[0].mlp.up_proj.row_scale.data[1] = float("inf")

    message = r"nan at step 3; 'model\.layers\.0\.mlp\.up_proj\.row_scale' holds NaN or infinity"
    with pytest.raises(FloatingPointError, match=message):
        train(model, stream(), TrainConfig(5), teacher, on_step=poison)
    assert not model.training


def test_a_gradient_that_is_not_finite_names_the_layer_and_reaches_no_parameter(pair):
    teacher, model = pair("planes")
    model.model.layers[0].mlp.up_proj.A.register_hook(lambda grad: grad * float("nan"))
    before = state(model)
    with pytest.raises(FloatingPointError, match=r"nan at step 0; the gradient of 'model\.layers\.0\.mlp\.up_proj\.A'"):
        train(model, stream(), TrainConfig(5), teacher)
    assert same(state(model), before)


@pytest.mark.parametrize(("given", "steps"), [(3, 5), (0, 1), (4, 5)])
def test_too_few_batches(pair, given, steps):
    teacher, model = pair("step")
    batches = [batch for batch, _ in zip(stream(), range(given), strict=False)]
    with pytest.raises(ValueError, match=f"ended after {given} of {steps} steps"):
        train(model, batches, TrainConfig(steps), teacher)


def test_a_model_cannot_teach_itself(pair):
    _, model = pair()
    with pytest.raises(ValueError, match=r"teacher is the model itself.*deepcopy"):
        train(model, stream(), TrainConfig(1), teacher=model)


def test_why_latents_are_fp32():
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        latent = torch.tensor(1.0, dtype=dtype)
        for _ in range(100):
            latent += 1e-3
        moved[dtype] = latent.item()
    assert moved[torch.bfloat16] == 1.0  # every single step rounds back: its next number is 1.0078
    assert moved[torch.float32] == pytest.approx(1.1, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_low_precision_train_only_after_float(tiny_llama, generator, dtype):
    model = tiny_llama().to(dtype)
    teacher = copy.deepcopy(model)
    ids = torch.randint(97, (2, 16), generator=generator)
    quantize(model, [ids], method("scalar"), skip=("layers.1", "lm_head"))
    before = state(model)
    with pytest.raises(TypeError, match=rf"'model\.embed_tokens\.weight' is {dtype}.*model\.float\(\)"):
        train(model, [ids], TrainConfig(1), teacher)
    assert same(state(model), before)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dtype == torch.float32)  # the other remedy: freeze the rest
    train(model, [ids], TrainConfig(1), teacher)
    changed = {name for name, now in state(model).items() if not torch.equal(now, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"latent", "A", "b", "row_scale", "col_scale"}
    train(model.float().requires_grad_(), [ids], TrainConfig(1), teacher)  # a teacher may be in any precision


# --- autocast, gradient checkpointing, accelerate -----------------------------------------------------------


def test_fifty_steps_under_autocast(pair):
    teacher, model = pair("planes")
    ids = next(stream())
    with torch.autocast("cpu", torch.bfloat16):
        history = train(model, [ids] * 50, TrainConfig(50, lr_latents=0.03, log_every=5), teacher)
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())


def test_backward_of_the_fp32_weights_is_not_autocast(pair):
    teacher, model = pair("planes")
    ids = next(stream())
    with torch.autocast("cpu", torch.bfloat16):
        (row,) = train(copy.deepcopy(model), [ids], TrainConfig(1), teacher)
        loss = distillation_loss(model(input_ids=ids).logits, teacher(input_ids=ids).logits)
    loss.backward()
    latents = torch.cat([layer.latent.grad.flatten() for _, layer in quant_layers(model)])
    assert row["grad_latents"] == pytest.approx(latents.norm().item(), rel=1e-6)


def gradients(model: nn.Module, teacher: nn.Module) -> dict[str, torch.Tensor]:
    ids = next(stream())
    model.train()
    distillation_loss(model(input_ids=ids, use_cache=False).logits, teacher(input_ids=ids).logits).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(pair, reentrant):
    teacher, model = pair("planes")
    expected = gradients(model, teacher)
    _, model = pair("planes")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, teacher)
    assert len(calls) == 2  # once more for backward
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_accelerate_in_one_process_gives_the_plain_result(pair, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    teacher, model = pair("planes")
    expected = train(model, stream(), RUN, teacher)
    path = tmp_path / "run.safetensors"
    try:
        _, stopped = pair("planes")
        with pytest.raises(Stop):
            train(
                stopped,
                stream(),
                RUN,
                teacher,
                checkpoint=path,
                on_step=stop_after(4),
                accelerator=Accelerator(cpu=True),
            )
        _, other = pair("planes")
        history = train(other, stream(), RUN, teacher, checkpoint=path, accelerator=Accelerator(cpu=True))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert history == expected
    assert same(state(other), state(model))


class LossScaler:
    """An accelerator as for fp16: the second of two processes, with losses scaled up for backward."""

    is_main_process, num_processes, scaler, gradient_accumulation_steps = False, 2, object(), 1
    wait_for_everyone = staticmethod(lambda: None)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
        self.model, self.param_groups, self.optimizer = model, optimizer.param_groups, optimizer
        return model, self

    def backward(self, loss: torch.Tensor) -> None:
        (loss * 2.0**10).backward()

    def unscale_gradients(self) -> None:
        self.overflow = any(not torch.isfinite(p.grad).all() for p in self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad /= 2.0**10

    def step(self) -> None:
        if not self.overflow:
            self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def test_scaled_losses_are_unscaled_before_clipping_and_one_process_saves(pair, tmp_path):
    teacher, model = pair("planes")
    expected = train(model, stream(), RUN, teacher)
    _, other = pair("planes")
    path = tmp_path / "run.safetensors"
    history = train(other, stream(), RUN, teacher, checkpoint=path, accelerator=LossScaler())
    assert same(state(other), state(model))
    assert [row["tokens"] for row in history] == [2 * row["tokens"] for row in expected]
    assert [row["grad_latents"] for row in history] == [row["grad_latents"] for row in expected]
    assert not list(tmp_path.iterdir())


def test_an_overflow_is_left_to_the_scaler(pair):
    teacher, model = pair("planes")
    model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    before = state(model)
    train(model, stream(), TrainConfig(2), teacher, accelerator=LossScaler())
    assert same(state(model), before)


def test_tokens_of_ragged_batches_are_counted_one_by_one(pair):
    teacher, model = pair("planes")
    batches = [next(stream())[:, :width] for width in (16, 4, 8)]
    rows = train(model, batches, TrainConfig(3, log_every=1), teacher)
    assert [row["tokens"] for row in rows] == [32, 40, 56]


def test_the_optimizer_is_adam_with_these_means(pair):
    """Three steps on one number, by hand."""
    teacher, model = pair("planes")
    weight, config, grads = model.model.norm.weight, TrainConfig(3, clip=float("inf")), []
    weight.register_hook(lambda grad: grads.append(grad.clone()))
    by_hand, mean, square = weight.detach().clone(), 0.0, 0.0
    train(model, stream(), config, teacher)
    for step, grad in enumerate(grads):
        mean, square = 0.9 * mean + 0.1 * grad, 0.95 * square + 0.05 * grad**2
        unbiased = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.95 ** (step + 1))
        by_hand -= config.lr_rest * config.rate(step) * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach(), by_hand, rtol=1e-5, atol=1e-7)


def test_the_model_is_in_training_mode_while_it_trains(pair):
    teacher, model = pair("planes")
    seen = []
    train(model.eval(), stream(), TrainConfig(1), teacher, on_step=lambda step, loss: seen.append(model.training))
    assert seen == [True] and not model.training and not teacher.training


def test_nothing_to_train_and_batches_that_would_be_summed_are_named(pair):
    teacher, model = pair("planes")
    accumulating = LossScaler()
    accumulating.gradient_accumulation_steps = 8
    with pytest.raises(ValueError, match="accumulates 8 batches per step"):
        train(model, stream(), TrainConfig(1), teacher, accelerator=accumulating)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        train(model.requires_grad_(False), stream(), TrainConfig(1), teacher)


def test_nothing_to_distil_is_named(pair):
    teacher, model = pair("planes")
    with pytest.raises(ValueError, match="no layer to train: quantize"):
        train(copy.deepcopy(teacher), stream(), TrainConfig(1), teacher)
    with pytest.raises(ValueError, match="the model itself, or quantized"):
        train(model, stream(), TrainConfig(1), copy.deepcopy(model))


@pytest.mark.parametrize("batch", [torch.zeros(8, dtype=torch.long), torch.zeros(2, 8), {"input_ids": None}])
def test_batches_that_are_none_are_named(pair, batch):
    teacher, model = pair("planes")
    with pytest.raises(ValueError, match="a training batch is .*; give batches of token ids"):
        train(model, [batch], TrainConfig(1), teacher)


def test_tokens_of_another_tokenizer_are_named(pair):
    teacher, model = pair("planes")
    words = model.config.vocab_size
    for batch, what in (
        (torch.tensor([[0, words]]), f"to {words}, the model knows 0 to {words - 1}"),
        (torch.tensor([[-1, 3]]), "from -1 to 3"),
    ):
        with pytest.raises(ValueError, match=f"a training batch holds tokens .*{what}"):
            train(model, [batch], TrainConfig(1), teacher)
        with pytest.raises(ValueError, match=f"a calibration batch holds tokens .*{what}"):
            quantize(copy.deepcopy(teacher), [batch], method())
