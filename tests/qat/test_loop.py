"""The training loop: where it starts, what it moves and by how much, and that it can be stopped and trusted.

Checked: the first loss is that of the quantized model; every trainable number gets a gradient and moves,
no other does; the schedule; the distillation loss against torch's own, in value and gradient; one step is
its rate in bins; an interrupted run ends bit by bit like an uninterrupted one; damaged or foreign
checkpoints, bad numbers and bad arguments are refused by name and change nothing; autocast, gradient
checkpointing, accelerate.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from lcqat_min.harness.evaluate import kl_to
from lcqat_min.ptq.matrix import CODEBOOKS, QuantConfig
from lcqat_min.ptq.model import quant_layers, quantize
from lcqat_min.qat import checkpoint
from lcqat_min.qat import loss as distillation
from lcqat_min.qat.loop import TrainConfig, bin_width, distillation_loss, parameter_groups, train

Pair = tuple[nn.Module, nn.Module]  # the unquantized model and its quantized copy


@pytest.fixture(scope="session")
def pair(tiny_llama: Callable[..., nn.Module]) -> Callable[..., Pair]:
    """`pair(kind, **settings)`: fresh copies of a tiny Llama and of the same, its first block quantized."""
    made: dict[tuple, Pair] = {}
    ids = torch.randint(97, (4, 32), generator=torch.Generator().manual_seed(1))

    def make(kind: str = "planes", **settings: object) -> Pair:
        key = (kind, *settings.items())
        if key not in made:
            teacher = tiny_llama().eval()
            model = copy.deepcopy(teacher)
            config = QuantConfig(codebook=kind, dim=2, skip=("layers.1", "lm_head"), **settings)
            quantize(model, [ids], config)
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


@pytest.mark.parametrize("kind", CODEBOOKS)
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
@pytest.mark.parametrize("kind", CODEBOOKS)
def test_what_is_trainable_moves_and_nothing_else(pair, kind, learn):
    teacher, model = pair(kind, learn_codebook=learn)
    model.model.layers[1].mlp.requires_grad_(False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    named = {
        "scalar": {"latent", "A", "b"},
        "lattice": {"latent", "A", "b"},
        "planes": {"latent", "A", "b"},
        "step": {"latent"},
        "table": {"table"},
    }[kind] | {"row_scale", "col_scale"}
    layer = "model.layers.0.self_attn.q_proj"
    frozen = set() if learn else {"A", "b", "table"}
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


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_training_brings_the_model_nearer_to_its_teacher(pair, kind):
    teacher, model = pair(kind)
    ids = next(stream())
    before = kl_to(teacher, model, ids.flatten(), window=16)
    codes = {name: layer.codes() for name, layer in quant_layers(model)}
    history = train(model, [ids] * 30, TrainConfig(30, lr_latents=0.03), teacher)
    assert kl_to(teacher, model, ids.flatten(), window=16) < 0.6 * before
    flipped = sum((layer.codes() != codes[name]).sum().item() for name, layer in quant_layers(model))
    assert history[-1]["flips"] == flipped / sum(c.numel() for c in codes.values())
    assert (flipped > 0) == (kind != "table")


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_one_step_is_the_rate_in_units_of_each_group(pair, kind):
    teacher, model = pair(kind)
    rates = {"lr_latents": 0.03, "lr_scales": 2e-3, "lr_codebooks": 3e-3, "lr_rest": 4e-4}
    config = TrainConfig(1, **rates, warmup=0, decay=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    width = {f"{name}.latent": bin_width(layer) for name, layer in quant_layers(model) if kind != "table"}
    train(model, stream(), config, teacher)
    for name, p in model.named_parameters():
        moved, last = (p - before[name]).abs().median().item(), name.rpartition(".")[2]
        size = before[name[:-1] + "A" if last == "b" else name].square().mean().sqrt().item()
        expected = {
            "latent": 0.03 * width.get(name, 0),
            "row_scale": 2e-3 * size,
            "col_scale": 2e-3 * size,
            "A": 3e-3 * size,
            "b": 3e-3 * size,
            "table": 3e-3 * size,
        }.get(last, 4e-4)
        if name.endswith("embed_tokens.weight"):  # most tokens were not seen, but all are predicted
            assert (p - before[name]).abs().max().item() == pytest.approx(expected, rel=0.02)
        assert moved == pytest.approx(expected, rel=0.02), name


def test_a_bin_is_one_on_a_grid_two_between_bits_and_the_step_where_it_is_learned(pair):
    widths = {}
    for kind in ("scalar", "lattice", "planes", "step"):
        _, layer = next(quant_layers(pair(kind)[1]))
        widths[kind] = bin_width(layer)
    step = layer.row_scale.mean().item()
    assert widths == {"scalar": 1, "lattice": 1, "planes": 2, "step": pytest.approx(step)}


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_every_trainable_tensor_is_in_one_group(pair, kind):
    _, model = pair(kind)
    groups = parameter_groups(model, TrainConfig(1))
    assert [group["name"] for group in groups] == [name for name, _ in model.named_parameters()]
    kinds = {
        "latent": "latents",
        **dict.fromkeys(("row_scale", "col_scale"), "scales"),
        **dict.fromkeys(("A", "b", "table"), "codebooks"),
    }
    for group in groups:
        assert group["kind"] == kinds.get(group["name"].rpartition(".")[2], "rest")
        assert group["full_lr"] > 0


def test_rows_of_the_history(pair):
    teacher, model = pair("planes")
    before, losses = {name: p.detach().clone() for name, p in model.named_parameters()}, []
    config = TrainConfig(7, log_every=3, lr_latents=0.1)
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


def test_a_teacher_is_evaluated_and_not_changed(tiny_gpt2, generator):
    teacher = tiny_gpt2()
    model = copy.deepcopy(teacher)
    ids = torch.randint(97, (2, 16), generator=generator)
    quantize(model, [ids], QuantConfig(codebook="scalar", skip=("h.1.", "lm_head")))
    expected, before, losses = kl_to(teacher, model, ids.flatten(), window=16), state(teacher), []
    for module in teacher.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    train(model, [ids], TrainConfig(1), teacher.train(), on_step=lambda step, loss: losses.append(loss))
    assert losses == [pytest.approx(expected, abs=1e-4)]
    assert same(state(teacher), before)
    assert all(p.grad is None for p in teacher.parameters())


# --- schedule and loss --------------------------------------------------------------------------------------


@given(steps=st.integers(1, 3000), warmup=st.floats(0, 1), decay=st.floats(0, 1))
def test_phases_sum_to_the_steps_and_the_rate_ends_near_zero(steps, warmup, decay):
    share = max(1.0, warmup + decay)
    config = TrainConfig(steps, warmup=warmup / share, decay=min(decay / share, 1 - warmup / share))
    up, stable, down = config.phases()
    assert up + stable + down == steps
    assert min(up, stable, down) >= 0
    rates = [config.rate(step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:up] == sorted(rates[:up])
    assert rates[up:] == sorted(rates[up:], reverse=True)
    assert rates[up : up + stable] == [1.0] * stable
    assert down == 0 or rates[-1] == pytest.approx(1 / (down + 1))


def test_two_phases_that_both_round_up():
    assert TrainConfig(3, warmup=0.5, decay=0.5).phases() == (2, 0, 1)


@pytest.mark.parametrize("elements", [1 << 25, 1, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_distillation_loss_is_kl_div(generator, monkeypatch, dtype, tolerance, elements):
    monkeypatch.setattr(distillation, "KL_ELEMENTS", elements)
    student, teacher = (3 * torch.randn(2, 5, 19, generator=generator).to(dtype) for _ in range(2))
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    log_t, log_s = (logits.flatten(0, 1).double().log_softmax(1) for logits in (teacher, exact))
    expected = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    (3 * expected).backward()
    loss = distillation_loss(student, teacher)
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=2 * tolerance, atol=tolerance * 0.1)


def test_distillation_gradients_survive_fp16_under_a_loss_scaler(generator):
    student = torch.randn(2000, 64, generator=generator).half().requires_grad_()
    loss = distillation_loss(student, torch.zeros(2000, 64, dtype=torch.float16))
    (2.0**12 * loss).backward()
    probability = student.detach().float().softmax(1)
    expected = (probability - 1 / 64) / 2000 * 2.0**12
    torch.testing.assert_close(student.grad.float(), expected, rtol=2e-3, atol=1e-5)


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
    refused(pair("planes", seed=3)[1], teacher, RUN, path, r"another model \('model\..*' differs\).*delete")
    refused(trained, teacher, RUN, path, "another model")
    refused(pair("planes")[1], None, RUN, path, other_run)  # another loss
    save_file({"weight": torch.ones(3)}, path)
    refused(pair("planes")[1], teacher, RUN, path, other_run)


def test_a_start_that_differs_in_last_digits_is_the_same_start(pair, tmp_path):
    path = tmp_path / "run.safetensors"
    teacher, model = pair("planes")
    whole = train(model, stream(), RUN, teacher)
    stopped, begun_elsewhere = pair("planes")[1], pair("planes")[1]
    with pytest.raises(Stop):
        train(stopped, stream(), RUN, teacher, checkpoint=path, on_step=stop_after(5))
    with torch.no_grad():
        for parameter in begun_elsewhere.parameters():
            parameter *= 1 + 5e-4  # further than a step goes: movement counts from where the run began
    history = train(begun_elsewhere, stream(), RUN, teacher, checkpoint=path)
    assert [row["flips"] for row in history] == [row["flips"] for row in whole]
    for key in ("loss", "moved_rest", "moved_scales", "moved_latents"):
        assert [row[key] for row in history] == pytest.approx([row[key] for row in whole], rel=0.01)
    for one, other in zip(begun_elsewhere.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_codes_without_latents_belong_to_the_start(pair, tmp_path):
    path = tmp_path / "run.safetensors"
    teacher, model = pair("table")
    train(model, stream(), RUN, teacher, checkpoint=path)
    other = pair("table")[1]
    for _, layer in quant_layers(other):
        layer.index.copy_(layer.index.flip(0))
    refused(other, teacher, RUN, path, r"another model \('model\..*index' differs\)")


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"\xff" * 64, lambda data: b""])
def test_a_damaged_checkpoint_says_so(pair, tmp_path, damage):
    path = tmp_path / "run.safetensors"
    teacher, model = pair("planes")
    train(model, stream(), RUN, teacher, checkpoint=path)
    path.write_bytes(damage(path.read_bytes()))
    refused(pair("planes")[1], teacher, RUN, path, r"run\.safetensors is .* no whole checkpoint, delete it")


def test_a_checkpoint_that_could_not_be_written_is_named_before_the_first_step(pair, tmp_path, monkeypatch):
    teacher, model = pair("planes")
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now raises ImportError
    before = state(model)
    with pytest.raises(ImportError, match="needs safetensors, .*pip install safetensors"):
        train(model, stream(), RUN, teacher, checkpoint=tmp_path / "run.safetensors")
    assert same(state(model), before)
    train(model, stream(), TrainConfig(1), teacher)


def test_a_half_written_file_is_ignored_and_a_home_is_found(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = tmp_path / "run.safetensors"
    path.with_name(path.name + ".part").write_bytes(b"half")
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

    message = r"nan at step 3; 'model\.layers\.0\.mlp\.up_proj\.row_scale' is the first parameter"
    with pytest.raises(FloatingPointError, match=message):
        train(model, stream(), TrainConfig(5), teacher, on_step=poison)
    assert not model.training


def test_a_gradient_that_is_not_finite_names_the_layer_and_reaches_no_parameter(pair):
    teacher, model = pair("planes")
    model.model.layers[0].mlp.up_proj.A.register_hook(lambda grad: grad * float("nan"))
    before = state(model)
    with pytest.raises(FloatingPointError, match=r"nan at step 0; .*'model\.layers\.0\.mlp\.up_proj\.A'"):
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


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"steps": 0}, "steps 0"),
        ({"steps": 1, "log_every": 0}, "log_every 0"),
        ({"steps": 1, "checkpoint_every": 0}, "checkpoint_every 0"),
        ({"steps": 9, "warmup": 0.6, "decay": 0.5}, "warmup 0.6 and decay 0.5"),
        ({"steps": 9, "warmup": -0.1}, "warmup -0.1"),
        ({"steps": 9, "clip": 0.0}, "clip is 0.0.*above 0"),
    ],
)
def test_wrong_settings(wrong, match):
    with pytest.raises(ValueError, match=match):
        TrainConfig(**wrong)


def test_latents_keep_steps_that_bf16_would_lose(pair):
    """From numbers that bf16 holds: with its 8 bits of precision, the next one after 1 is 1.0078, and less is lost."""
    teacher, model = pair("planes")
    latents = [layer.latent for _, layer in quant_layers(model)]
    with torch.no_grad():
        begin = torch.cat([latent.copy_(latent.bfloat16()).flatten() for latent in latents])
    train(model, stream(), TrainConfig(4, lr_latents=1e-4), teacher)
    end = torch.cat([latent.detach().flatten() for latent in latents])
    assert (end != begin).float().mean() > 0.9 and (end.bfloat16() == begin).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_low_precision_train_only_after_float(tiny_llama, generator, dtype):
    model = tiny_llama().to(dtype)
    teacher = copy.deepcopy(model)
    ids = torch.randint(97, (2, 16), generator=generator)
    quantize(model, [ids], QuantConfig(codebook="scalar", skip=("layers.1", "lm_head")))
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


def test_a_frozen_codebook_belongs_to_the_start(pair, tmp_path):
    path = tmp_path / "run.safetensors"
    teacher, model = pair("planes", learn_codebook=False)
    train(model, stream(), RUN, teacher, checkpoint=path)
    other = pair("planes", learn_codebook=False)[1]
    with torch.no_grad():
        next(layer for _, layer in quant_layers(other)).A.mul_(1.5)
    refused(other, teacher, RUN, path, r"another model \('model\..*A' differs\)")


def test_a_start_with_three_percent_of_other_numbers_is_another(pair, tmp_path):
    path = tmp_path / "run.safetensors"
    teacher, model = pair("planes")
    train(model, stream(), RUN, teacher, checkpoint=path)
    other = pair("planes")[1]
    with torch.no_grad():
        other.model.embed_tokens.weight.flatten()[: 97 * 32 * 3 // 100].mul_(2)
    refused(other, teacher, RUN, path, r"another model \('model.embed_tokens.weight' differs\)")


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


def test_the_first_rate_of_a_warm_up():
    config = TrainConfig(100, warmup=0.2)
    assert [config.rate(0), config.rate(19), config.rate(20)] == pytest.approx([1 / 21, 20 / 21, 1])


def test_the_model_is_in_training_mode_while_it_trains(pair):
    teacher, model = pair("planes")
    seen = []
    train(model.eval(), stream(), TrainConfig(1), teacher, on_step=lambda step, loss: seen.append(model.training))
    assert seen == [True] and not model.training and not teacher.training


def test_nothing_to_train_and_batches_that_would_be_summed_are_named(pair):
    teacher, model = pair("planes")
    accumulating = LossScaler()
    accumulating.gradient_accumulation_steps = 8
    with pytest.raises(ValueError, match="accumulates 8 batches a step"):
        train(model, stream(), TrainConfig(1), teacher, accelerator=accumulating)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        train(model.requires_grad_(False), stream(), TrainConfig(1), teacher)


def test_nothing_to_distil_is_named(pair):
    teacher, model = pair("planes")
    with pytest.raises(ValueError, match="no layer whose codes can be trained: quantize"):
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
            quantize(copy.deepcopy(teacher), [batch], QuantConfig())


@pytest.mark.parametrize("rate", ["lr_latents", "lr_scales", "lr_codebooks", "lr_rest"])
@pytest.mark.parametrize("value", [-1e-4, float("nan")])
def test_rates_below_nothing_are_refused(rate, value):
    with pytest.raises(ValueError, match="learning rates .* must be 0"):
        TrainConfig(1, **{rate: value})


def test_processes_that_resume_apart_are_told(monkeypatch):
    def gather(found: list, done: int) -> None:
        found[:] = 2, done

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    checkpoint.agree(2)
    with pytest.raises(ValueError, match=r"resume after \[2, 0\] steps"):
        checkpoint.agree(0)
