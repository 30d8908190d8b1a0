"""Packed models: layout of the bytes, equality with the model in training, size, files, refusals.

Checked: bit strings against a slow packer that writes digits as text; indices and logits of training, packed
and dense layers for every codebook, with biases, ties and odd widths; fp16 rounding, also out of its range;
further training; bits counted from tensors against bytes of the file and against sums by hand; every kind of
damaged file. How a folder is written: test_atomic_save.py.
"""

import copy
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinds import method
from safetensors.torch import load_file, save_file

from lcqat_min import TrainConfig, quantize, train
from lcqat_min.codebook import CodedMatrix, pack_bits, scalar, unpack_bits
from lcqat_min.harness import indices_of
from lcqat_min.layer.linear import AffineLinear, QuantLinear
from lcqat_min.layer.stored import row_scale_of
from lcqat_min.packing import (
    PackedLinear,
    PackedSpec,
    bits_per_weight,
    export_dense,
    load_packed,
    pack_layers,
    save_packed,
    to_storage_precision,
)
from lcqat_min.ptq import Method, lcqat
from lcqat_min.ptq.model import IN_TRAINING
from lcqat_min.systems import free_vq

QUICK = {"feedback": False, "refits": 0}
KINDS = {
    "scalar": method("scalar", **QUICK),
    "lattice": method("lattice", **QUICK),
    "planes": method("planes", **QUICK),
    "planes, d=3": method("planes", dim=3, rotate="input", **QUICK),
    "planes, d=8": method("planes", dim=8, rotate="none", **QUICK),
    "planes, 3 bits": method("planes", dim=2, bits=3.0, **QUICK),
    "trellis": method("trellis", reach=3, **QUICK),
    "trellis, 1.5 bits": method("trellis", bits=1.5, **QUICK),
    "step": method("step", **QUICK),
    "table": method("table", dim=2, **QUICK),
}
TOKENS = torch.arange(2 * 24).view(2, 24) % 97


@pytest.fixture(scope="module", autouse=True)
def no_fitting():
    """Any codebook will do here, so take the starting ones: fitting is most of the time of `quantize`."""
    modules = lcqat, free_vq
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "fit", lambda x, start, rounds: start)
        lcqat.normal_codebook.cache_clear()
        free_vq.normal_table.cache_clear()
        yield
    lcqat.normal_codebook.cache_clear()
    free_vq.normal_table.cache_clear()


def llama(width: int = 32, inner: int = 48, tied: bool = True) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def quantized(model: torch.nn.Module, config: Method) -> torch.nn.Module:
    """Quantized, with numbers that training would have moved, at the precision of a file."""
    quantize(model, [TOKENS], config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("col_scale", "row_scale", "bias")):
                p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator))
                p.add_(0.1 if name.endswith("bias") else 0)
    to_storage_precision(model)
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def largest_difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Of their logits, as a share of the largest logit: fp32 rounds in proportion."""
    a, b = logits(one), logits(other)
    return ((a - b).abs().max() / a.abs().max()).item()


@pytest.fixture(scope="module")
def ready(tiny_gpt2) -> Callable[[str, str], torch.nn.Module]:
    """`ready(make, kind)`: a quantized model, made once.

    gpt2 has biases and is tied; odd has no biases and is untied, and 27 and 45 fill neither vectors, bytes nor blocks.
    """
    makers = {"llama": llama, "gpt2": tiny_gpt2, "odd": lambda: llama(27, 45, tied=False)}
    make_once = functools.cache(lambda make, kind: quantized(makers[make](), KINDS[kind]))
    return lambda make, kind: copy.deepcopy(make_once(make, kind))


@pytest.fixture
def planes(ready) -> torch.nn.Module:
    return ready("llama", "planes")


@pytest.fixture
def saved(planes, tmp_path) -> Path:
    save_packed(planes, tmp_path / "model")
    return tmp_path / "model"


# ------------------------------------------------------------------------------------------------- bytes


@given(st.data())
def test_bit_strings_against_text(data):
    bits = data.draw(st.integers(1, 16))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=5, max_size=5)
    rows = data.draw(st.lists(row, min_size=1, max_size=3))
    packed = pack_bits(torch.tensor(rows), bits)
    for row, octets in zip(rows, packed.tolist(), strict=True):
        text = "".join(f"{index:0{bits}b}" for index in row)
        text += "0" * (-len(text) % 8)
        assert "".join(f"{octet:08b}" for octet in octets) == text
    assert unpack_bits(packed, bits, 5).tolist() == rows


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_all_byte_values_survive(bits):
    packed = torch.arange(256, dtype=torch.uint8).repeat_interleave(bits // 8 or 1).view(1, -1)
    count = packed.numel() * 8 // bits
    assert torch.equal(pack_bits(unpack_bits(packed, bits, count), bits), packed)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_a_byte_holds_four_weights_the_first_in_the_high_bits(dim):
    digits = torch.tensor([[-1.5, -0.5, 0.5, 1.5]])
    index = (digits.view(-1, dim) + 1.5).long() @ (4 ** torch.arange(dim - 1, -1, -1))
    assert pack_bits(index.view(1, -1), 2 * dim).tolist() == [[0b00011011]]


# ------------------------------------------------------------------------------- equality of all three


@pytest.mark.parametrize("make, kind", [("odd", kind) for kind in KINDS] + [("gpt2", "planes"), ("gpt2", "table")])
def test_training_packed_and_dense_agree(kind, make, ready, tmp_path):
    from transformers import AutoModelForCausalLM

    model = ready(make, kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_packed(model, tmp_path / "packed")
    export_dense(model, tmp_path / "dense")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    packed, trainable = load_packed(tmp_path / "packed"), load_packed(tmp_path / "packed", trainable=True)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    indices = indices_of(model)
    for other in (packed, trainable):
        assert all(torch.equal(index, indices[name]) for name, index in indices_of(other).items())
        assert len(indices_of(other)) == len(indices)
    assert not any(isinstance(module, (QuantLinear, PackedLinear)) for module in dense.modules())
    assert max(largest_difference(model, other) for other in (packed, trainable, dense)) <= 1e-5
    for other in (packed, trainable, dense):
        tied = other.get_output_embeddings().weight is other.get_input_embeddings().weight
        assert tied == (make == "gpt2")


def test_packed_layer_takes_any_leading_shape_and_dtype(planes):
    layer = next(iter(pack_layers(planes).values()))
    x = torch.randn(2, 3, 32)
    assert torch.allclose(layer(x)[1, 2], layer(x[1, 2]), atol=1e-6)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x))


def test_weights_are_decoded_a_few_at_a_time(planes, monkeypatch):
    layer = next(iter(pack_layers(planes).values()))
    whole = layer(torch.eye(32))
    monkeypatch.setattr("lcqat_min.kernels.decode.WORKSPACE", 384)  # three rows
    assert torch.allclose(layer(torch.eye(32)), whole, atol=1e-6)


def test_casting_a_packed_model_leaves_codes_scales_and_codebooks_alone(saved, tmp_path):
    model = load_packed(saved)
    before = model.state_dict()
    model.bfloat16()
    for name, value in model.state_dict().items():
        was = before[name]
        assert torch.equal(value, was.bfloat16() if was.dtype == torch.float32 else was), name
    bits = save_packed(model, tmp_path / "half")
    assert bits.parts["embeddings"] == 97 * 32 * 16
    again = load_packed(tmp_path / "half").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------- storage precision


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_to_storage_precision_is_exact_and_done_once(kind, ready):
    model = ready("odd", kind)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("_scale", "A", "b", "table")):
                p.mul_(1.0001)
    indices, start = indices_of(model), {name: p.clone() for name, p in model.named_parameters()}
    to_storage_precision(model)
    assert all(torch.equal(index, indices[name]) for name, index in indices_of(model).items())
    for name, p in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("row_scale", "col_scale", "A", "b", "table"):
            assert torch.equal(p, start[name].half().float()), name
        elif leaf != "latent":
            assert torch.equal(p, start[name]), name
    once = {name: p.clone() for name, p in model.named_parameters()}
    to_storage_precision(model)
    assert all(torch.equal(p, once[name]) for name, p in model.named_parameters())


@given(st.lists(st.floats(2.0**-90, 2.0**90), min_size=1, max_size=8))
def test_scales_of_any_size_keep_eleven_bits(values):
    layer = row_of_scales(torch.tensor(values))
    wanted = layer.row_scale.detach().clone()
    to_storage_precision(layer)
    got = layer.row_scale.detach()
    large = wanted >= wanted.max() * 2.0**-28
    assert ((got - wanted).abs() <= wanted * 2.0**-11)[large].all()
    assert ((got - wanted).abs() <= wanted.max() * 2.0**-37).logical_or(large).all()
    assert torch.equal(row_scale_of(pack_layers(layer)[""].stored()), got)
    to_storage_precision(layer)
    assert torch.equal(layer.row_scale, got)


@torch.no_grad()
def test_a_row_of_zeros_beside_a_large_one_stays_finite(tmp_path):
    model = llama()
    projection = model.model.layers[0].mlp.up_proj
    projection.weight *= 100
    projection.weight[3] = 0
    quantize(model, [TOKENS], KINDS["step"])
    to_storage_precision(model)
    assert torch.isfinite(logits(model)).all()
    save_packed(model, tmp_path / "model")
    for trainable in (False, True):
        assert largest_difference(model, load_packed(tmp_path / "model", trainable)) < 1e-5


def test_a_head_that_was_untied_by_hand_is_not_lost(planes, tmp_path):
    planes.lm_head.weight = torch.nn.Parameter(2 * planes.lm_head.weight.detach())
    with pytest.raises(ValueError, match="'lm_head.weight' is not tied.*tie_word_embeddings = False"):
        save_packed(planes, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("write", [save_packed, export_dense])
def test_added_layers_are_refused_rather_than_lost(write, planes, tmp_path):
    class Adapter(torch.nn.Module):
        def __init__(self, base: torch.nn.Module):
            super().__init__()
            self.base = base

    added, wrapped = copy.deepcopy(planes), planes
    added.model.more = added.model.layers[0].mlp.up_proj
    wrapped.model.layers[0].mlp.up_proj = Adapter(wrapped.model.layers[0].mlp.up_proj)
    for model, name in ((added, "model.more"), (wrapped, "model.layers.0.mlp.up_proj")):
        with pytest.raises(ValueError, match=f"'{name}.*' is not as the configuration builds it: merge or remove"):
            write(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_save_pretrained_writes_of_a_model_in_training_is_refused_and_not_lost(tmp_path):
    teacher = llama()
    model = type(teacher)(teacher.config).eval()  # both built from one config, as people do
    model.load_state_dict(teacher.state_dict())
    quantize(model, [TOKENS], KINDS["planes"])
    assert model.config is model.model.config and not hasattr(teacher.config, "quantization_config")
    train(model, [TOKENS] * 3, TrainConfig(steps=3))
    model.save_pretrained(tmp_path / "model")
    for load in (load_packed, type(teacher).from_pretrained):
        with pytest.raises(ValueError, match="by save_pretrained from a model in training.*quantize the original ag"):
            load(tmp_path / "model")
    again = copy.deepcopy(teacher)
    quantize(again, [TOKENS], KINDS["planes"])
    again.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"), strict=False)  # the tied head is missing
    assert torch.equal(logits(again), logits(model))
    save_packed(again, tmp_path / "packed")
    load_packed(tmp_path / "packed")


@pytest.mark.parametrize("architecture", ["GPTNeoX", "Mixtral"])
def test_an_export_has_the_names_of_published_checkpoints(architecture, tmp_path):
    """transformers renames the head of one and fuses the experts of the other while it loads them."""
    import transformers

    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    experts = {"num_key_value_heads": 2, "num_local_experts": 2} if architecture == "Mixtral" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**sizes, **experts)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path / "published")
    quantize(model, [TOKENS], KINDS["planes"])
    export_dense(model, tmp_path / "dense")
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("published", "dense")]
    assert names[0] == names[1]
    to_storage_precision(model)
    assert largest_difference(model, type(model).from_pretrained(tmp_path / "dense")) <= 1e-5


def test_a_packed_model_is_quantized_already(planes, tmp_path):
    save_packed(planes, tmp_path / "model")
    with pytest.raises(ValueError, match="this model is quantized already"):
        quantize(load_packed(tmp_path / "model"), [TOKENS], method())


def row_of_scales(scale: torch.Tensor) -> QuantLinear:
    index = torch.zeros(len(scale), 4, dtype=torch.long)
    return AffineLinear(CodedMatrix(scalar(), index, scale), 4, None, (None, None))


def test_numbers_that_do_not_fit_are_refused_before_anything_changes(planes, tmp_path):
    layers = [layer for layer in planes.modules() if isinstance(layer, QuantLinear)]
    with torch.no_grad():
        layers[0].row_scale[0] = 0.1234567
        layers[-1].col_scale[0] = 1e6
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.mlp.down_proj': col_scale reaches 1e\+06"):
        to_storage_precision(planes)
    assert layers[0].row_scale[0] == torch.tensor(0.1234567)
    with pytest.raises(ValueError, match="train at a lower rate"):
        save_packed(planes, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------- further training


@pytest.mark.parametrize("kind", ["planes", "step", "table"])
def test_training_goes_on_from_the_file(kind, ready, tmp_path):
    model = ready("llama", kind)
    save_packed(model, tmp_path / "model")
    loaded = load_packed(tmp_path / "model", trainable=True)
    assert loaded.config.quantization_config == IN_TRAINING

    def loss(m: torch.nn.Module) -> torch.Tensor:
        return m(input_ids=TOKENS, labels=TOKENS).loss

    assert loss(loaded).item() == pytest.approx(loss(model).item(), abs=1e-6)
    history = train(loaded, [TOKENS] * 10, TrainConfig(steps=10, log_every=1, log_movement=True))
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(history[-1][key] > 0 for key in history[-1] if key.startswith(("grad_", "moved_")))
    if kind == "table":
        tables = {id(module.table) for module in loaded.modules() if hasattr(module, "table")}
        assert len(tables) == 1
    save_packed(loaded, tmp_path / "model")
    to_storage_precision(loaded)
    assert largest_difference(loaded.eval(), load_packed(tmp_path / "model")) <= 1e-5


def test_settings_of_training_come_back(tmp_path):
    config = method("planes", estimator="dge", learn_codebook=False, **QUICK)
    save_packed(quantized(llama(), config), tmp_path / "model")
    loaded = load_packed(tmp_path / "model", trainable=True)
    layer = next(module for module in loaded.modules() if isinstance(module, QuantLinear))
    assert layer.estimator == "dge" and not layer.A.requires_grad and layer.latent.requires_grad


# -------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize("kind", KINDS)
def test_bits_agree_with_the_bytes_on_file(kind, ready, tmp_path):
    model = ready("odd", kind)
    bits = save_packed(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert bits.bytes == sum(tensor.nbytes for tensor in stored.values())
    assert bits == bits_per_weight(model) == bits_per_weight(load_packed(tmp_path / "model"))
    assert sum(name.endswith(".table") for name in stored) == (kind == "table")
    assert not any("latent" in name for name in stored)
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear))
    own = sum(tensor.nbytes for name, tensor in stored.items() if "_proj." in name)
    assert bits.per_weight == 8 * own / weights
    unquantized = sum(p.numel() for p in llama(27, 45, tied=False).parameters())
    assert bits.per_parameter == 8 * bits.bytes / unquantized


@pytest.mark.parametrize("kind", ["planes", "table"])
def test_unquantized_parts_are_saved_in_the_dtype_asked_for(kind, ready, tmp_path):
    model = ready("odd", kind)
    bits = save_packed(model, tmp_path / "half", torch.bfloat16)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert bits.bytes == sum(tensor.nbytes for tensor in stored.values())
    assert {tensor.dtype for name, tensor in stored.items() if "embed" in name or "norm" in name} == {torch.bfloat16}
    assert next(model.parameters()).dtype == torch.float32
    loaded = load_packed(tmp_path / "half", trainable=True)
    assert bits == bits_per_weight(load_packed(tmp_path / "half")) and loaded.config.dtype == torch.bfloat16
    layer, same = (next(m for m in one.modules() if isinstance(m, QuantLinear)) for one in (model, loaded))
    assert torch.equal(layer.indices(), same.indices()) and same.col_scale.dtype == torch.float32
    assert largest_difference(model, loaded.float()) < 0.02  # embeddings and norms of 8 bits


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64, "bfloat16"])
def test_other_dtypes_are_refused(dtype, planes, tmp_path):
    with pytest.raises(ValueError, match="give torch.bfloat16, torch.float16 or torch.float32"):
        save_packed(planes, tmp_path / "model", dtype)


def test_buffers_count_and_keep_their_dtype(planes, tmp_path, monkeypatch):
    class Counting(type(planes)):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("seen", torch.ones(5, dtype=torch.float32))

    planes.__class__ = Counting
    planes.register_buffer("seen", torch.tensor([0.1, 1, 2, 3, 4]))
    before = bits_per_weight(planes)
    bits = save_packed(planes, tmp_path / "model", torch.bfloat16)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert bits.bytes == sum(tensor.nbytes for tensor in stored.values()) and torch.equal(stored["seen"], planes.seen)
    assert before.parts["other"] - bits.parts["other"] == 16 * sum(
        p.numel() for name, p in planes.named_parameters() if "norm" in name
    )
    del planes.seen
    with pytest.raises(ValueError, match="'seen' is not as the configuration builds it"):
        save_packed(planes, tmp_path / "again")


def test_a_head_of_another_size_is_refused(tmp_path):
    model = quantized(llama(tied=False), KINDS["planes"])
    model.lm_head = torch.nn.Linear(32, 50, bias=False)
    with pytest.raises(ValueError, match="'lm_head.weight' is not as the configuration builds it"):
        save_packed(model, tmp_path / "model")


def test_embeddings_that_fp16_cannot_hold_are_refused(planes, tmp_path):
    with torch.no_grad():
        planes.model.embed_tokens.weight[3, 4] = -1e5
    with pytest.raises(ValueError, match="'model.embed_tokens.weight' reaches 100000, too much for torch.float16"):
        save_packed(planes, tmp_path / "model", torch.float16)
    assert not (tmp_path / "model").exists()
    save_packed(planes, tmp_path / "model", torch.bfloat16)


@pytest.mark.parametrize("width, most", [(256, 2.3), (768, 2.3), (2048, 2.05)])
def test_promised_sizes(width, most):
    shapes = {"weight": [width, width // 4], "row_scale": [width], "unit": [1], "col_scale": [width]}
    shapes |= {"A": [4, 8], "b": [4], "signs_in": [width // 8], "signs_out": [width // 8]}
    with torch.device("meta"):  # only shapes are counted
        layer = PackedLinear(PackedSpec("lcqat", shapes))
    counted = bits_per_weight(layer)
    by_hand = 2 + 16 * (36 + 1 + 2 * width) / width**2 + 2 / width
    assert counted.per_weight == pytest.approx(by_hand, abs=1e-9) and by_hand <= most


def test_bits_of_unquantized_models():
    model = llama()
    assert bits_per_weight(model).per_weight == bits_per_weight(model).per_parameter == 32
    assert bits_per_weight(model.bfloat16()).per_weight == 16
    assert "16.0000 bits per parameter" in str(bits_per_weight(model))


def test_skipped_layers_count_at_their_own_width():
    model = llama()
    quantize(model, [TOKENS], method(**QUICK), skip=("lm_head", "mlp"))
    bits = bits_per_weight(model)
    assert bits.parts["linear layers"] == 32 * 3 * 32 * 48 and bits.weights == 4 * 8 * 32
    assert bits.parts["embeddings"] == 32 * 97 * 32 and bits.parts["other"] == 32 * 3 * 32


# ------------------------------------------------------------------------------------------------- files


def test_models_that_cannot_be_saved_are_refused(tmp_path):
    with pytest.raises(ValueError, match="call quantize first"):
        save_packed(llama(), tmp_path / "model")
    with pytest.raises(TypeError, match="Sequential is not a transformers model"):
        save_packed(torch.nn.Sequential(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- refusals


def edit_config(folder: Path, edit) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_spec(folder: Path, **changes) -> None:
    edit_config(folder, lambda settings: settings["layers"][NAME].update(changes))


def edit_shape(folder: Path, key: str, shape: list[int]) -> None:
    edit_config(folder, lambda settings: settings["layers"][NAME]["shapes"].update({key: shape}))


NAME = "model.layers.0.self_attn.q_proj"
DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 900), "tensors is truncated or damaged"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read .*No such file.*: give a folder"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is truncated or damaged"),
    "foreign": (lambda f: edit_config(f, lambda q: q.update(quant_method="gptq")), "quant_method: gptq"),
    "ordinary": (lambda f: edit_config(f, dict.clear), "not a packed model .* load it with transformers"),
    "in training": (
        lambda f: edit_config(f, lambda q: q.update(version="in training")),
        "by save_pretrained from a model in training.* load_state_dict the tensors",
    ),
    "older": (
        lambda f: edit_config(f, lambda q: q.update(version=1)),
        "version 1, not 2: quantize again, or use the lcqat_min that wrote it",
    ),
    "newer": (
        lambda f: edit_config(f, lambda q: q.update(version=3)),
        "version 3, not 2: quantize again, or use the lcqat_min that wrote it",
    ),
    "no layers": (lambda f: edit_config(f, lambda q: q.pop("layers")), "config.json does not describe packed layers"),
    "unknown setting": (lambda f: edit_spec(f, new=1), "config.json does not describe packed layers"),
    "altered shape": (lambda f: edit_shape(f, "weight", [8, 9]), r"q_proj.weight of .* not \('U8', \(8, 9\)\)"),
    "another tensor": (lambda f: edit_shape(f, "B", [4]), r"q_proj.B of .* is missing, not \('F16', \(4,\)\)"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(f"{NAME}.A")), "q_proj.A of .* is missing"),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{NAME}.A": torch.zeros(4, 4).half()})),
        r"q_proj.A of .* is \('F16', \(4, 4\)\), not \('F16', \(4, 8\)\)",
    ),
    "wrong dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{NAME}.b": torch.zeros(4)})),
        r"q_proj.b of .* is \('F32', \(4,\)\), not \('F16', \(4,\)\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_by_name(damage, saved):
    do, message = DAMAGE[damage]
    do(saved)
    with pytest.raises((ValueError, OSError), match=message) as error:
        load_packed(saved)
    assert str(saved) in str(error.value)


def test_a_model_that_is_compiled_is_saved_as_itself(planes, saved, tmp_path):
    save_packed(torch.compile(planes), tmp_path / "again")
    export_dense(torch.compile(planes), tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors").is_file()
    for file in saved.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_model_of_another_class_comes_back_as_that_class(planes, tmp_path):
    from transformers import LlamaForSequenceClassification

    planes.config.pad_token_id = 0
    model = LlamaForSequenceClassification(planes.config)
    model.model = planes.model
    save_packed(model, tmp_path / "classifier")
    again = load_packed(tmp_path / "classifier")
    assert type(again) is type(model) and torch.equal(again.score.weight, model.score.weight)
    assert "= LlamaForSequenceClassification.from_pre" in (tmp_path / "classifier" / "README.md").read_text()


def test_a_part_of_a_packed_model_with_a_shared_table_is_saved_whole(ready, tmp_path):
    save_packed(ready("llama", "table"), tmp_path / "model")
    packed = load_packed(tmp_path / "model")
    bits = save_packed(packed.model, tmp_path / "part")
    assert bits.parts["codebooks"] == bits_per_weight(packed).parts["codebooks"] > 0
    part = load_packed(tmp_path / "part")
    assert torch.equal(part(input_ids=TOKENS)[0], packed.model(input_ids=TOKENS)[0])


def test_one_packed_layer_whose_table_another_stores_can_be_looked_at(ready, tmp_path):
    save_packed(ready("llama", "table"), tmp_path / "model")
    layer = load_packed(tmp_path / "model").model.layers[0].mlp.down_proj
    assert layer.spec.owner and bits_per_weight(layer).parts["codes"] == 8 * layer.weight.nbytes


def test_a_packed_model_asks_for_no_gradient_until_it_is_to_be_trained(saved):
    assert not any(p.requires_grad for p in load_packed(saved).parameters())
    assert all(p.requires_grad for p in load_packed(saved, trainable=True).parameters())


# ------------------------------------------------------------------------------------ without this package


def test_a_dense_export_needs_no_package_of_ours_and_a_packed_folder_names_it(planes, saved, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    export_dense(planes, tmp_path / "dense")
    assert not any(b"lcqat" in file.read_bytes() for file in (tmp_path / "dense").iterdir())
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "lcqat_min.hf", raising=False)  # as before the import
    assert largest_difference(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), planes) <= 1e-5
    with pytest.raises(RuntimeError, match="(?i)mismatch"):
        AutoModelForCausalLM.from_pretrained(saved)
