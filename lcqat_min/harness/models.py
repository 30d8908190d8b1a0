"""Load a language model and its tokenizer by name or folder, with errors that say what to do.

The bundled model lies beside the package in a clone and inside of it where pip installed it, so neither needs a
network. Any other name goes to the Hugging Face hub (or its cache) through `from_pretrained`. Code that comes with a
checkpoint is never run: `trust_remote_code` is off (left out, transformers would ask).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import nn

PACKAGE = Path(__file__).resolve().parents[1]
DATA = PACKAGE / "bundled" if (PACKAGE / "bundled").is_dir() else PACKAGE.parent  # see pyproject.toml
BUNDLED = DATA / "models" / "doc-llama"


def choose_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N` as a device that is there; else ValueError that says what to use."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; use cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(
            f"device {name!r} is not supported: second moments need float64, which it may lack. Use cpu or cuda."
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} was asked for, but this torch finds no CUDA device. Use --device cpu, or install "
            "a CUDA build of torch."
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    return device


def load(name: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, object]:
    """Model (fp32, eval mode, on `device`) and tokenizer of a folder or a hub name; ValueError says why it failed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    name = os.path.expanduser(name)
    if os.environ.get("LCQAT_QUIET") == "1":
        disable_progress_bar()
    if _is_quantized(name):
        raise ValueError(f"the model in {name} is quantized already: give the unquantized one it was made from")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(str(name), dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_why(name, error)) from error
    words, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
    if words < rows / 10:  # transformers makes up an empty tokenizer where the files are missing
        raise ValueError(
            f"the tokenizer of {name} knows {words} tokens, the model {rows}: its files are missing. "
            "tokenizer.save_pretrained puts them beside the model"
        )
    return model.to(device).eval(), tokenizer


def label(name: str | Path | None) -> str:
    """What results call a model: the bundled one (also None) by one name, wherever it lies, and no other by that."""
    bundled = f"models/{BUNDLED.name}"
    if name is None or Path(name).resolve() == BUNDLED:
        return bundled
    return str(Path(name).resolve()) if Path(name) == Path(bundled) else str(name)


def _is_quantized(name: str | Path) -> bool:
    file = Path(name) / "config.json"
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("quantization_config"))
    except (OSError, ValueError, AttributeError):
        return False  # no folder, or one that transformers will complain of


def _why(name: str | Path, error: Exception) -> str:
    path = Path(name)
    if path.is_file():
        return f"cannot load a model from the file {path}: give the folder that save_pretrained wrote."
    if path.is_dir():
        missing = [file for file in ("config.json", "tokenizer_config.json") if not (path / file).is_file()]
        reason = f"it lacks {' and '.join(missing)}" if missing else f"transformers says: {_first_line(error)}"
        return f"cannot load a model from the folder {path}: {reason}. Give a folder that save_pretrained wrote."
    return (
        f"cannot load {str(name)!r}: it is no folder, and not on the hub, or there is no network and it is not in the "
        f"cache ({_first_line(error)}). Check the name; for the bundled model leave "
        "--model out."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
