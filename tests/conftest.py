"""What all tests share: no network, no GPU, quiet, few threads, small random models of two kinds."""

import os

# Set before the first import of tqdm (by torch), triton, transformers or datasets, which read them once.
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRITON_INTERPRET", "1")  # on the CPU; set it to 0 to test on a GPU

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ["LCQAT_STRICT"] = "1"  # a fast way that fails is an error, not a warning
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # two processes run side by side

# Derandomized: a failure is a change of the code, never of the luck.
settings.register_profile("lcqat", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("lcqat")


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh CPU generator, seeded the same for every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., torch.nn.Module]:
    """`tiny_llama(seed=0)`: a new random Llama: vocabulary 97, 2 layers of width 32, tied, no biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return lambda seed=0: _seeded(LlamaForCausalLM, copy.deepcopy(config), seed)  # tests change it


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[..., torch.nn.Module]:
    """`tiny_gpt2(seed=0)`: a new random GPT-2 of that size: Conv1D weights, biases, tied, no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_inner=48,
        n_layer=2,
        n_head=2,
        n_positions=256,
        initializer_range=0.2,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return lambda seed=0: _seeded(GPT2LMHeadModel, copy.deepcopy(config), seed)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `model`, a random one with the bundled tokenizer, and `text.txt`; tests may add to it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lcqat_min.harness.models import BUNDLED

    path = tmp_path_factory.mktemp("place")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    _seeded(LlamaForCausalLM, config, 0).save_pretrained(path / "model")
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(path / "model")
    words = "return the array of given shape or raise an error when it has no length at all".split()
    draws = torch.randint(0, len(words), (150, 200), generator=torch.Generator().manual_seed(0))
    (path / "text.txt").write_text("\n\n".join(" ".join(words[i] for i in line) for line in draws))
    return path


def _seeded(model_class: type, config: object, seed: int) -> torch.nn.Module:
    """A float32 model in training mode; its weights are large enough for every layer to move the logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(copy.deepcopy(config)).float().train()  # tests may change the config of their model
