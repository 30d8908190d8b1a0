"""Packed models: layout of the bytes, equality with the model in training, size, files, refusals.

Checked: bit strings against a slow packer that writes digits as text; codes and logits of training, packed
and dense forms for every codebook, with biases, ties and odd widths; fp16 rounding, also out of its range;
further training; bits counted from tensors against bytes of the file and against sums by hand; statistics of
hand-made codes; every kind of damaged file. How a folder is written: test_folder.py.
"""

import copy
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lcqat_min import QuantConfig, TrainConfig, quantize, train
from lcqat_min.codebook.digits import digits_of
from lcqat_min.layer.linear import QuantLinear
from lcqat_min.packing.convert import pack_layers, unpack_layers
from lcqat_min.packing.files import (
    PackedLinear,
    bits_per_weight,
    code_stats,
    codes_of,
    export_dense,
    load_packed,
    save_packed,
    to_storage_precision,
)
from lcqat_min.packing.layer import pack_bits, unpack_bits
from lcqat_min.ptq.matrix import normal_codebook
from lcqat_min.ptq.model import IN_TRAINING

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"feedback": False, "refits": 0}
KINDS = {
    "scalar": QuantConfig(codebook="scalar", **QUICK),
    "lattice": QuantConfig(codebook="lattice", **QUICK),
    "planes": QuantConfig(codebook="planes", **QUICK),
    "planes, d=3": QuantConfig(codebook="planes", dim=3, rotate="input", **QUICK),
    "planes, d=8": QuantConfig(codebook="planes", dim=8, rotate="none", **QUICK),
    "step": QuantConfig(codebook="step", **QUICK),
    "table": QuantConfig(codebook="table", dim=2, **QUICK),
}
TOKENS = torch.arange(2 * 24).view(2, 24) % 97


@pytest.fixture(scope="module", autouse=True)
def no_fitting():
    """Any codebook will do here, so take the starting ones: fitting is most of the time of `quantize`."""
    with pytest.MonkeyPatch.context() as patch:
        normal_codebook.cache_clear()
        patch.setattr("lcqat_min.ptq.model.fit", lambda x, start, rounds: start)
        yield
    normal_codebook.cache_clear()


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


def quantized(model: torch.nn.Module, config: QuantConfig) -> torch.nn.Module:
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
    """`ready(make, kind)`: a quantized model, made once. 27 and 45 fill neither vectors, bytes nor blocks."""
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


# ------------------------------------------------------------------------------- equality of all forms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", ["gpt2", "odd"])  # biases and tied; no biases and untied
def test_training_packed_and_dense_agree(kind, make, ready, tmp_path):
    from transformers import AutoModelForCausalLM

    model = ready(make, kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_packed(model, tmp_path / "packed")
    export_dense(model, tmp_path / "dense")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    packed, trainable = load_packed(tmp_path / "packed"), load_packed(tmp_path / "packed", trainable=True)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    codes = codes_of(model)
    for other in (packed, trainable):
        assert all(torch.equal(index, codes[name]) for name, index in codes_of(other).items())
        assert len(codes_of(other)) == len(codes)
    assert not any(isinstance(module, (QuantLinear, PackedLinear)) for module in dense.modules())
    assert max(largest_difference(model, other) for other in (packed, trainable, dense)) <= 1e-5
    for other in (packed, trainable, dense):
        tied = other.get_output_embeddings().weight is other.get_input_embeddings().weight
        assert tied == (make == "gpt2")


def test_packed_layer_takes_any_leading_shape_and_dtype(planes):
    layer = next(iter(pack_layers(planes).values()))
    x = torch.randn(2, 3, 32)
    assert torch.allclose(layer(x)[1, 2], layer(x[1, 2]), atol=1e-6)
    expected = x.double() @ unpack_layers({"": layer})[""].weight.double().T
    half = layer(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):  # must not reach the arithmetic, which would be 100 times less exact
        found = layer(x)
    for y, dtype, tolerance in ((half, torch.bfloat16, 0.02), (found, torch.float32, 1e-5)):
        assert y.dtype == dtype and (y - expected).abs().max() < tolerance * expected.abs().max()


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
    codes, start = codes_of(model), {name: p.clone() for name, p in model.named_parameters()}
    to_storage_precision(model)
    assert all(torch.equal(index, codes[name]) for name, index in codes_of(model).items())
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
    assert ((got - wanted).abs() <= wanted.max() * 2.0**-38).logical_or(large).all()
    assert torch.equal(pack_layers(layer)[""].scale(), got)
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
    with pytest.raises(ValueError, match="'lm_head.weight' has a weight of its own.*tie_word_embeddings = False"):
        save_packed(planes, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("write", [save_packed, export_dense])
def test_a_wrapped_layer_is_refused_rather_than_lost(write, planes, tmp_path):
    class Adapter(torch.nn.Module):
        def __init__(self, base: torch.nn.Module):
            super().__init__()
            self.base, self.scale = base, torch.nn.Parameter(torch.ones(()))

    planes.model.layers[0].mlp.up_proj = Adapter(planes.model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match="'model.layers.0.mlp.up_proj.base.weight' first: loaded again.*Merge or rem"):
        write(planes, tmp_path / "model")
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
        with pytest.raises(ValueError, match="by save_pretrained from a model in training.*Quantize the original ag"):
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
        quantize(load_packed(tmp_path / "model"), [TOKENS], QuantConfig())


def row_of_scales(scale: torch.Tensor) -> QuantLinear:
    from lcqat_min.codebook import scalar
    from lcqat_min.layer.linear import AffineLinear
    from lcqat_min.ptq.ldlq import Rounded

    index = torch.zeros(len(scale), 4, dtype=torch.long)
    rounded = Rounded(scalar(), index, scale, scalar().decode(index).flatten(1), scale)
    return AffineLinear(4, len(scale), rounded, None, None, None, "ste", True, True)


def test_numbers_that_do_not_fit_are_refused_before_anything_changes(planes, tmp_path):
    layers = [layer for layer in planes.modules() if isinstance(layer, QuantLinear)]
    with torch.no_grad():
        layers[0].row_scale[0] = 0.1234567
        layers[-1].col_scale[0] = 1e6
    with pytest.raises(ValueError, match=r"col_scale of layer 'model.layers.0.mlp.down_proj' reaches 1e\+06"):
        to_storage_precision(planes)
    assert layers[0].row_scale[0] == torch.tensor(0.1234567)
    with pytest.raises(ValueError, match="Did training diverge"):
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
    history = train(loaded, [TOKENS] * 10, TrainConfig(steps=10, log_every=1))
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(history[-1][key] > 0 for key in history[-1] if key.startswith(("grad_", "moved_")))
    if kind == "table":
        tables = {id(module.table) for module in loaded.modules() if hasattr(module, "table")}
        assert len(tables) == 1
    save_packed(loaded, tmp_path / "model")
    to_storage_precision(loaded)
    assert largest_difference(loaded.eval(), load_packed(tmp_path / "model")) <= 1e-5


def test_settings_of_training_come_back(tmp_path):
    config = QuantConfig(codebook="planes", estimator="dge", learn_codebook=False, **QUICK)
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
    assert torch.equal(layer.codes(), same.codes()) and same.col_scale.dtype == torch.float32
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
    with pytest.raises(ValueError, match="'seen' first: loaded again"):
        save_packed(planes, tmp_path / "again")


def test_a_head_of_another_size_is_refused(tmp_path):
    model = quantized(llama(tied=False), KINDS["planes"])
    model.lm_head = torch.nn.Linear(32, 50, bias=False)
    with pytest.raises(ValueError, match="'lm_head.weight' first: loaded again"):
        save_packed(model, tmp_path / "model")


def test_embeddings_that_fp16_cannot_hold_are_refused(planes, tmp_path):
    with torch.no_grad():
        planes.model.embed_tokens.weight[3, 4] = -1e5
    with pytest.raises(ValueError, match="'model.embed_tokens.weight' reaches 100000, more than torch.float16 holds"):
        save_packed(planes, tmp_path / "model", torch.float16)
    assert not (tmp_path / "model").exists()
    save_packed(planes, tmp_path / "model", torch.bfloat16)


@pytest.mark.parametrize("width, most", [(256, 2.3), (768, 2.3), (2048, 2.05)])
def test_promised_sizes(width, most):
    from lcqat_min.packing.layer import Form

    class Layer(PackedLinear):
        def __init__(self):  # on no device: only shapes are counted
            with torch.device("meta"):
                super().__init__(Form("affine", width, width, 4, 8, 2, True, True, False))

    counted = bits_per_weight(Layer())
    by_hand = 2 + 16 * (36 + 2 * width) / width**2 + 2 / width
    assert counted.per_weight == pytest.approx(by_hand, abs=1e-9) and by_hand <= most


def test_bits_of_unquantized_models():
    model = llama()
    assert bits_per_weight(model).per_weight == bits_per_weight(model).per_parameter == 32
    assert bits_per_weight(model.bfloat16()).per_weight == 16
    assert "16.0000 bits a parameter" in str(bits_per_weight(model))


def test_skipped_layers_count_at_their_own_width():
    model = llama()
    quantize(model, [TOKENS], QuantConfig(skip=("lm_head", "mlp"), **QUICK))
    bits = bits_per_weight(model)
    assert bits.parts["linear layers"] == 32 * 3 * 32 * 48 and bits.weights == 4 * 8 * 32
    assert bits.parts["embeddings"] == 32 * 97 * 32 and bits.parts["other"] == 32 * 3 * 32


# ------------------------------------------------------------------------------------- use of the codes


def layer_with_latents(latent: list[float], levels: int) -> QuantLinear:
    """A row of scalars, or (two levels) of vectors d = 1, m = 2, with these latents."""
    from lcqat_min.codebook import AffineCodebook
    from lcqat_min.layer.linear import AffineLinear
    from lcqat_min.ptq.ldlq import Rounded

    digits = 1 if levels == 4 else 2
    book = AffineCodebook(torch.ones(1, digits), torch.zeros(1), levels)
    vectors = len(latent) // digits
    index = torch.zeros(1, vectors, dtype=torch.long)
    start = Rounded(book, index, torch.ones(1), torch.zeros(1, vectors), torch.zeros(1))
    layer = AffineLinear(vectors, 1, start, None, None, None, "ste", True, True)
    with torch.no_grad():
        layer.latent.copy_(torch.tensor([latent]))
    return layer


def test_code_statistics_of_hand_made_layers():
    layer = layer_with_latents([0.0, 1.0, 2.0, 3.0, -0.2, 0.2, 3.3, 3.0], levels=4)
    stats = code_stats(layer)[""]
    assert stats.usage.tolist() == [3, 1, 1, 3]
    assert stats.entropy == pytest.approx(2 * 1 / 8 * 3 + 2 * 3 / 8 * (3 - 1.5849625), abs=1e-6)
    assert stats.outer == 6 / 8 and stats.beyond == 2 / 8 and stats.flips is None
    before = codes_of(layer)
    with torch.no_grad():
        layer.latent[0, 0] = 1.4
    assert code_stats(layer, before)[""].flips == 1 / 8
    with pytest.raises(ValueError, match="codes_of"):
        code_stats(layer, {"another": before[""]})

    planes = code_stats(layer_with_latents([1.5, -0.5, -1.0, 0.1, 0.3, 0.3, 2.0, -2.0], levels=2))[""]
    assert planes.usage.tolist() == [0, 1, 2, 1]
    assert planes.entropy == pytest.approx(1.5) and planes.outer is None and planes.beyond == 3 / 8

    packed = code_stats(pack_layers(layer)[""], before)[""]
    assert packed.flips == 1 / 8 and packed.beyond is None and packed.outer == 5 / 8


def test_uniform_codes_have_all_the_entropy():
    layer = layer_with_latents(digits_of(torch.arange(4), 2, 2).flatten().tolist(), levels=2)
    assert code_stats(layer)[""].entropy == 2.0


# ------------------------------------------------------------------------------------------------- files


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_models_that_cannot_be_saved_are_refused(tmp_path):
    with pytest.raises(ValueError, match="call quantize first"):
        save_packed(llama(), tmp_path / "model")
    with pytest.raises(TypeError, match="Sequential is no transformers model"):
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


def flip_a_bit(tensors: dict) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] ^= 1


def edit_form(folder: Path, **changes) -> None:
    edit_config(folder, lambda settings: settings["layers"][NAME].update(changes))


NAME = "model.layers.0.self_attn.q_proj"
DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 900), r"tensors is truncated or damaged"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), r"tensors is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config.json is missing: give a folder"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"config.json is not the JSON"),
    "foreign": (lambda f: edit_config(f, lambda q: q.update(quant_method="gptq")), r"quant_method: gptq"),
    "ordinary": (lambda f: edit_config(f, dict.clear), r"no packed model .* Load it with transformers"),
    "newer": (lambda f: edit_config(f, lambda q: q.update(version=2)), r"version 2, .* update lcqat"),
    "no layers": (lambda f: edit_config(f, lambda q: q.pop("layers")), r"config.json describes no layers"),
    "unknown setting": (lambda f: edit_form(f, new=1), r"config.json describes no layers"),
    "altered exponent": (lambda f: edit_form(f, exponent=1), r"altered since it was saved"),
    "altered shape": (lambda f: edit_form(f, inputs=36), r"q_proj.weight of .* not \('U8', \(8, 9\)\)"),
    "altered codes": (lambda f: edit_tensors(f, flip_a_bit), r"altered since it was saved"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(f"{NAME}.A")), r"q_proj.A of .* is missing"),
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
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_packed(saved)
    assert str(saved) in str(error.value)


def test_a_model_that_is_compiled_is_saved_as_itself(planes, saved, tmp_path):
    whole = contents(saved)
    save_packed(torch.compile(planes), saved)
    export_dense(torch.compile(planes), tmp_path / "dense")
    assert contents(saved) == whole and (tmp_path / "dense" / "model.safetensors").is_file()


def test_a_model_of_another_class_comes_back_as_that_class(planes, tmp_path):
    from transformers import LlamaForSequenceClassification

    planes.config.pad_token_id = 0
    model = LlamaForSequenceClassification(planes.config)
    model.model = planes.model
    save_packed(model, tmp_path / "classifier")
    again = load_packed(tmp_path / "classifier")
    assert type(again) is type(model) and torch.equal(again.score.weight, model.score.weight)


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
    assert layer.form.owner and list(code_stats(layer)) == [""]


def test_a_packed_model_asks_for_no_gradient_until_it_is_to_be_trained(saved):
    assert not any(p.requires_grad for p in load_packed(saved).parameters())
    assert all(p.requires_grad for p in load_packed(saved, trainable=True).parameters())


# ------------------------------------------------------------------------------------ without this package


def test_the_dense_export_needs_no_package_of_ours_and_a_packed_one_asks_for_it(planes, saved, tmp_path):
    export_dense(planes, tmp_path / "dense")
    program = (
        "import sys; sys.modules['lcqat_min'] = None\n"
        "import torch; from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'dense')!r})\n"
        "tokens = torch.arange(2 * 24).view(2, 24) % 97\n"
        f"save_file({{'logits': model(input_ids=tokens).logits.detach()}}, {str(tmp_path / 'logits')!r})\n"
        f"AutoModelForCausalLM.from_pretrained({str(saved)!r})\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    theirs = load_file(tmp_path / "logits")["logits"]
    assert torch.allclose(theirs, logits(planes), atol=1e-5)
    assert run.returncode == 1 and "Unknown quantization type, got lcqat_min.hf" in run.stderr
    assert "RuntimeError" in run.stderr and "mismatch" in run.stderr.lower()
