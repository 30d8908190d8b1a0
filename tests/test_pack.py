"""Packed models: layout of the bytes, equality with the model in training, size, files, refusals.

Checked: bit strings against a slow packer that writes digits as text; codes and logits of training, packed
and dense forms for every codebook, with biases, ties and odd widths; fp16 rounding, also out of its range;
further training; bits counted from tensors against bytes of the file and against sums by hand; code statistics
on hand-made codes; a save that is interrupted anywhere; every kind of damaged file.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lcqat_min import QuantConfig, TrainConfig, quantize, train
from lcqat_min.codebook import digits_of
from lcqat_min.convert import normal_codebook
from lcqat_min.linear import QuantLinear
from lcqat_min.pack import (
    PackedLinear,
    bits_per_weight,
    code_stats,
    codes_of,
    export_dense,
    load_packed,
    save_packed,
    to_storage_precision,
)
from lcqat_min.packed import pack_bits, unpack_bits
from lcqat_min.storage import pack_layers

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.fixture(scope="module", autouse=True)
def no_fitting():
    """Any codebook will do here, so take the starting ones: fitting is most of the time of `quantize`."""
    with pytest.MonkeyPatch.context() as patch:
        normal_codebook.cache_clear()
        patch.setattr("lcqat_min.codebook.fit", lambda x, start, rounds: start)
        yield
    normal_codebook.cache_clear()


TOKENS = torch.arange(2 * 24).view(2, 24) % 97


def llama(width: int = 32, inner: int = 48, tied: bool = True) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97, hidden_size=width, intermediate_size=inner, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
        head_dim=8, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2,
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
def planes() -> torch.nn.Module:
    return quantized(llama(), KINDS["planes"])


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
@pytest.mark.parametrize("make", ["llama", "gpt2", "odd"])
def test_training_packed_and_dense_agree(kind, make, tiny_gpt2, tmp_path):
    from transformers import AutoModelForCausalLM

    if make == "odd":  # untied; widths that fill neither vectors nor bytes nor blocks of the rotation
        model = quantized(llama(27, 45, tied=False), KINDS[kind])
    else:
        model = quantized(tiny_gpt2() if make == "gpt2" else llama(), KINDS[kind])
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
        assert tied == (make != "odd")


def test_packed_layer_takes_any_leading_shape_and_dtype(planes):
    layer = next(iter(pack_layers(planes).values()))
    x = torch.randn(2, 3, 32)
    assert torch.allclose(layer(x)[1, 2], layer(x[1, 2]), atol=1e-6)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x))


def test_rows_are_decoded_a_few_at_a_time(planes, monkeypatch):
    layer = next(iter(pack_layers(planes).values()))
    whole = layer(torch.eye(32))
    monkeypatch.setattr("lcqat_min.packed.ROWS", 3)
    assert max(len(rows) for rows in layer._decoded_rows()) == 3
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
    again = load_packed(tmp_path / "half")
    assert again.dtype == torch.bfloat16 and torch.equal(logits(again), logits(model))


# ------------------------------------------------------------------------------------- storage precision


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_to_storage_precision_is_exact_and_done_once(kind):
    model = llama()
    quantize(model, [TOKENS], KINDS[kind])
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
    assert ((got - wanted).abs() <= wanted.max() * 2.0**-39).logical_or(large).all()
    assert torch.equal(pack_layers(layer)[""].scale(), got)
    to_storage_precision(layer)
    assert torch.equal(layer.row_scale, got)


def row_of_scales(scale: torch.Tensor) -> QuantLinear:
    from lcqat_min.calibrate import Rounded
    from lcqat_min.codebook import scalar
    from lcqat_min.linear import AffineLinear

    index = torch.zeros(len(scale), 4, dtype=torch.long)
    rounded = Rounded(scalar(), index, scale, scalar().decode(index).flatten(1), scale)
    return AffineLinear(4, len(scale), rounded, None, None, None, "ste", True, True)


def test_numbers_that_do_not_fit_are_refused_before_anything_changes(planes, tmp_path):
    import copy

    model = copy.deepcopy(planes)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    with torch.no_grad():
        layers[0].row_scale[0] = 0.1234567
        layers[-1].col_scale[0] = 1e6
    with pytest.raises(ValueError, match=r"col_scale of layer 'model.layers.0.mlp.down_proj' reaches 1e\+06"):
        to_storage_precision(model)
    assert layers[0].row_scale[0] == torch.tensor(0.1234567)
    with pytest.raises(ValueError, match="Did training diverge"):
        save_packed(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------- further training


@pytest.mark.parametrize("kind", ["planes", "step", "table"])
def test_training_goes_on_from_the_file(kind, tmp_path):
    model = quantized(llama(), KINDS[kind])
    save_packed(model, tmp_path / "model")
    loaded = load_packed(tmp_path / "model", trainable=True)
    assert not hasattr(loaded.config, "quantization_config")

    def loss(m: torch.nn.Module) -> torch.Tensor:
        return m(input_ids=TOKENS, labels=TOKENS).loss

    assert loss(loaded).item() == pytest.approx(loss(model).item(), abs=1e-6)
    history = train(loaded, [TOKENS] * 20, TrainConfig(steps=20, log_every=1))
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
