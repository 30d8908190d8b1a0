"""Packed folders through transformers' own from_pretrained, in a process that has never seen the model.

Checked: same logits and same greedy tokens in a new process after `import lcqat_min.hf`, also in a pipeline;
a dtype that is asked for; damaged files refused as by load_packed; saving points to our own function.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lcqat_min import QuantConfig, quantize
from lcqat_min.pack import PackedLinear, load_packed, save_packed, to_storage_precision

ROOT = Path(__file__).resolve().parents[1]
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
NEW_PROCESS = """
import json, sys
import lcqat_min.hf, torch
from transformers import AutoModelForCausalLM, pipeline
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
x = torch.tensor([[3, 1, 4, 1, 5]])
tokens = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=12, do_sample=False)
text = pipeline("text-generation", model=folder)("b e", max_new_tokens=3, do_sample=False)
print(json.dumps([tokens.tolist(), model(input_ids=x).logits[0, -1].tolist(), text[0]["generated_text"]]))
"""


@pytest.fixture(scope="module")
def model(tiny_llama) -> torch.nn.Module:
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    quantize(model, [PROMPT], QuantConfig(codebook="table", dim=2, feedback=False, refits=0))
    to_storage_precision(model)
    return model.eval()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save_packed(model, tmp_path / "model")
    return tmp_path / "model"


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(97)}, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="!").save_pretrained(folder)


def test_same_greedy_tokens_in_a_new_process(model, folder):
    save_tokenizer(folder)
    command = [sys.executable, "-c", NEW_PROCESS, str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    tokens, logits, text = json.loads(run.stdout.splitlines()[-1])
    with torch.no_grad():
        ours = model(input_ids=PROMPT).logits[0, -1]
    greedy = {"attention_mask": torch.ones_like(PROMPT), "do_sample": False}
    assert torch.allclose(torch.tensor(logits), ours, atol=1e-5)
    assert tokens == model.generate(PROMPT, max_new_tokens=12, **greedy).tolist()
    of_text = model.generate(torch.tensor([[65, 68]]), max_new_tokens=3, do_sample=False)[0]  # "b" and "e"
    assert text.replace(" ", "") == "".join(chr(33 + token) for token in of_text.tolist())


def test_a_dtype_that_is_asked_for_leaves_the_packed_tensors_alone(folder):
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


def test_altered_files_are_refused(folder):
    from transformers import AutoModelForCausalLM

    import lcqat_min.hf  # noqa: F401

    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="altered since it was saved"):
        AutoModelForCausalLM.from_pretrained(folder)
    file.write_bytes(content[:-7])
    with pytest.raises(ValueError, match="truncated"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_save_pretrained_leads_to_save_packed(folder, tmp_path, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging._get_library_root_logger(), "propagate", True)
    with pytest.raises(ValueError, match="not serializable"):
        load_packed(folder).save_pretrained(tmp_path / "copy")
    assert "save_packed" in caplog.text
