"""Load a language model and its tokenizer by name or folder, with errors that say what to do.

The bundled model lies beside the package in a clone and inside it where pip installed it, so neither needs a network.
Any other name goes to the Hugging Face hub (or its cache) through `from_pretrained`. Code that comes with a checkpoint
is never run: `trust_remote_code` is off (without that, transformers would ask).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError

PACKAGE = Path(__file__).resolve().parents[1]
DATA = PACKAGE / "bundled" if (PACKAGE / "bundled").is_dir() else PACKAGE.parent  # see pyproject.toml
BUNDLED = DATA / "models" / "doc-llama"


def choose_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N` as a device that exists here; UsageError for any other."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}; use cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UsageError(
            f"device {name!r} is not supported: second moments need float64, which it may lack. Use cpu or cuda."
        )
    if not torch.cuda.is_available():
        raise UsageError(
            f"device {name!r}: this torch finds no CUDA device. Use cpu, or install a CUDA build of torch."
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def load(name: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """Model (fp32, eval mode, on `device`) and tokenizer of a folder or a hub name; UsageError where that fails."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = os.path.expanduser(name)
    if _is_quantized(name):
        raise UsageError(f"the model in {name} is quantized already: give the unquantized one it was made from")
    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    known, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
    if known < rows / 10:  # transformers makes an empty tokenizer where the files are missing
        raise UsageError(
            f"the tokenizer of {name} knows {known} tokens, the model {rows}: its files are missing. "
            "tokenizer.save_pretrained puts them beside the model"
        )
    return model.to(device).eval(), tokenizer


def stored_dtype(name: str | Path) -> torch.dtype:
    """The dtype that the numbers of a model are stored in. `load` gives fp32, to train; files keep the stored one."""
    from transformers import AutoConfig

    with _explained(name):
        return AutoConfig.from_pretrained(str(name), trust_remote_code=False).dtype or torch.float32


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder or a hub name; UsageError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except ImportError:
        raise
    except Exception as error:
        raise UsageError(
            f"{folder} holds no tokenizer that can be read: tokenizer.save_pretrained({str(folder)!r}) puts one beside "
            f"the model. transformers says: {_first_line(error)}"
        ) from error


def label(name: str | Path | None) -> str:
    """What results call a model. The bundled one (also None) has one name, wherever it lies, and no other has that."""
    bundled = f"models/{BUNDLED.name}"
    if name is None or Path(name).resolve() == BUNDLED:
        return bundled
    return str(Path(name).resolve()) if Path(name) == Path(bundled) else str(name)


def _is_quantized(name: str | Path) -> bool:
    file = Path(name) / "config.json"
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("quantization_config"))
    except (OSError, ValueError, AttributeError):
        return False  # a hub name, or a folder that from_pretrained will refuse


@contextmanager
def _explained(name: str | Path) -> Iterator[None]:
    """Turn what from_pretrained raises for a wrong name or a damaged folder, of whatever type, into a UsageError."""
    try:
        yield
    except ImportError:  # it names the package that is missing
        raise
    except Exception as error:
        raise UsageError(_why(str(name), _first_line(error))) from error


def _why(name: str, said: str) -> str:
    path = Path(name)
    if path.is_file():
        return f"cannot load a model from the file {path}: give the folder that save_pretrained wrote."
    if path.is_dir():
        missing = [file for file in ("config.json", "tokenizer_config.json") if not (path / file).is_file()]
        reason = f"it lacks {' and '.join(missing)}" if missing else f"transformers says: {said}"
        return f"cannot load a model from the folder {path}: {reason}. Give a folder that save_pretrained wrote."
    return (
        f"cannot load {name!r}: it is neither a folder here nor, as far as transformers can see, a model on the hub "
        f"or in its cache ({said}). Check the name and the network; for the bundled model leave --model out."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
