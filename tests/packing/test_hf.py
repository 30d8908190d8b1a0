"""Packed folders through transformers' own from_pretrained.

Checked: same logits and same greedy tokens; that the module which config.json names registers the reader; a requested
dtype; other places, devices and heads; damaged files refused as by load_packed; saving points to our own function.
"""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from kinds import method

from lcqat_min import quantize
from lcqat_min.packing import PackedLinear, export_dense, load_packed, save_packed, to_storage_precision

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(scope="module")
def model(tiny_llama) -> torch.nn.Module:
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    quantize(model, [PROMPT], method("table", dim=2, feedback=False, refits=0))
    to_storage_precision(model)
    return model.eval()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save_packed(model, tmp_path / "model")
    return tmp_path / "model"


def test_the_module_that_config_json_names_registers_the_reader(folder):
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    name = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    module = importlib.import_module(name)
    assert AUTO_QUANTIZER_MAPPING[name] is module.PackedQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[name] is module.PackedConfig


def test_same_greedy_tokens(model, folder):
    from transformers import AutoModelForCausalLM

    import lcqat_min.hf  # noqa: F401

    greedy = {"attention_mask": torch.ones_like(PROMPT), "do_sample": False, "max_new_tokens": 12}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.generate(PROMPT, **greedy), model.generate(PROMPT, **greedy))


def test_a_requested_dtype_leaves_the_packed_tensors_alone(folder):
    from transformers import AutoModelForCausalLM

    import lcqat_min.hf  # noqa: F401

    stored = load_packed(folder).state_dict()
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name, module in half.named_modules():
        if isinstance(module, PackedLinear):
            for key, value in module.named_buffers():
                original = stored[f"{name}.{key}"]
                assert torch.equal(value, original) and value.dtype == original.dtype


@pytest.mark.parametrize(
    "how",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"attn_implementation": "eager"},
        {"revision": "main"},
        {"dtype": "auto"},
        {
            "device_map": {
                "model.embed_tokens": "cpu",
                "model.layers": "disk",
                "model.norm": "cpu",
                "model.rotary_emb": "cpu",
                "lm_head": "cpu",
            }
        },
    ],
    ids=str,
)
def test_arguments_of_from_pretrained_do_not_change_the_map(how, model, folder, tmp_path):
    from transformers import AutoModelForCausalLM

    import lcqat_min.hf  # noqa: F401

    offload = {"offload_folder": str(tmp_path / "offload")} if "disk" in str(how) else {}
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(folder, **how, **offload)(input_ids=PROMPT).logits
        assert torch.allclose(loaded, model(input_ids=PROMPT).logits, atol=1e-4)


def test_a_relative_path_and_a_subfolder_are_found(model, folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    import lcqat_min.hf  # noqa: F401

    monkeypatch.chdir(folder.parent)
    for load in (load_packed, AutoModelForCausalLM.from_pretrained):
        assert isinstance(load("model").model.layers[1].mlp.up_proj, PackedLinear)
    inside = AutoModelForCausalLM.from_pretrained(str(folder.parent), subfolder="model")
    assert isinstance(inside.model.layers[1].mlp.up_proj, PackedLinear)


def test_heads_can_be_left_out_added_and_changed(model, folder, tmp_path):
    """The layers share a table, so their names in the file are also the names of its owner."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    import lcqat_min.hf  # noqa: F401

    with torch.no_grad():
        hidden = model.model(input_ids=PROMPT)[0]
        base = AutoModel.from_pretrained(folder)
        assert torch.allclose(base(input_ids=PROMPT)[0], hidden, atol=1e-4)
        save_packed(base, tmp_path / "base")
        for loaded in (
            load_packed(tmp_path / "base"),
            AutoModelForCausalLM.from_pretrained(tmp_path / "base").model,
            AutoModelForSequenceClassification.from_pretrained(folder, pad_token_id=0).model,
        ):
            assert torch.allclose(loaded(input_ids=PROMPT)[0], hidden, atol=1e-4)
            assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == 14
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # the head is tied, so it is there, too
    assert torch.allclose(whole(input_ids=PROMPT).logits, model(input_ids=PROMPT).logits, atol=1e-4)


def test_a_base_model_is_quantized_saved_and_exported_like_any_other(tiny_llama, tmp_path):
    from transformers import AutoModel

    model = tiny_llama().model.eval()
    quantize(model, [PROMPT], method("scalar", feedback=False, refits=0))
    to_storage_precision(model)
    save_packed(model, tmp_path / "packed")
    export_dense(model, tmp_path / "dense")
    with torch.no_grad():
        for loaded in (load_packed(tmp_path / "packed"), AutoModel.from_pretrained(tmp_path / "dense")):
            assert type(loaded) is type(model)
            assert torch.allclose(loaded(input_ids=PROMPT)[0], model(input_ids=PROMPT)[0], atol=1e-4)


def test_a_class_without_these_layers_says_so(folder):
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

    import lcqat_min.hf  # noqa: F401

    for load in (GPT2LMHeadModel.from_pretrained, lambda f: LlamaForCausalLM.from_pretrained(f, num_hidden_layers=0)):
        with pytest.raises(
            ValueError, match="lacks layers of the packed model, such as 'model.layers.0.*`architectures`"
        ):
            load(folder)


def test_a_packed_model_is_not_unpacked_in_place(folder):
    with pytest.raises(NotImplementedError, match="export_dense.*load_packed"):
        load_packed(folder).dequantize()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"version": 2', '"version": 1', "format version 1"),
        ('"table": [', '"table": [1', "is .* not .*: copy it again"),
    ],
)
def test_folders_are_checked_as_by_load_packed(old, new, message, folder):
    from transformers import AutoModelForCausalLM

    import lcqat_min.hf  # noqa: F401

    config = folder / "config.json"
    assert old in (text := re.sub(r"\[\s+", "[", config.read_text()))
    config.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_save_pretrained_leads_to_save_packed(folder, tmp_path, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging._get_library_root_logger(), "propagate", True)
    with pytest.raises(ValueError, match="not serializable"):
        load_packed(folder).save_pretrained(tmp_path / "copy")
    assert "save_packed" in caplog.text
