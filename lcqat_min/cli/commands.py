"""The commands that work on one model: from its name to a packed folder, and on from there.

    quantize   model  -> packed folder       round with error feedback (ptq/model.py)
    train      packed -> packed              distil the unquantized model into it (qat/loop.py)
    export     packed -> ordinary folder     for tools that do not know this package
    generate   packed or ordinary -> text
    bits       packed or ordinary -> what it costs

Each function takes the parsed arguments of cli/main.py and prints what it did.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..disk.whole_file import alone
from ..errors import UsageError
from ..harness.batches import batches, longest_window, sample_windows
from ..harness.evaluate import kl_to
from ..harness.generate import continue_prompt
from ..harness.models import BUNDLED, choose_device, load, load_tokenizer, stored_dtype
from ..harness.results import difference, optional, write_json
from ..harness.text import load_text, say_if_repeated
from ..layer.linear import quant_layers
from ..packing.files import bits_per_weight, config_of, export_dense, load_packed, save_packed
from ..packing.layer import PackedLinear
from ..ptq.allocate import RATES, allocate
from ..ptq.method import Method
from ..ptq.model import quantize
from ..ptq.select import linear_layers
from ..qat.config import TrainConfig
from ..qat.loop import train
from ..systems.table import method_of

WINDOW, BATCH = 256, 4
EVAL_TOKENS = 16_384
FAR = 2.0  # nats per token: more than rounding to 2 bits moves a model


def run_quantize(args: argparse.Namespace) -> None:
    """Quantize a model and save it packed."""
    settings = [*args.set, f"bits={args.bits}"] if args.bits in RATES and not args.mixed else args.set
    method = method_with(args.method, settings)
    mixed = args.bits is not None and settings == args.set
    if mixed and not hasattr(method, "bits"):
        raise UsageError(f"--bits: {args.method} has 2 bits per weight; choose another --method for other rates")
    with _new(args.out):
        name = args.model or BUNDLED
        model, tokenizer = load(name, choose_device(args.device))
        dtype = stored_dtype(name)
        _check_skip(model, args.skip)
        text = load_text(args.text, tokenizer, model=model)
        window, generator = _window(model), torch.Generator().manual_seed(args.seed)
        count = max(1, min(args.tokens, len(text.train)) // window)
        windows = sample_windows(text.train, count, window, generator)
        print(f"{method}, calibrated on {windows.numel()} tokens")
        choices = {"skip": ("lm_head", *args.skip), "seed": args.seed}
        changes = _rates(model, windows.split(8), args.bits, choices) if mixed else {}
        bar = partial(tqdm, unit="layer")
        reports = quantize(model, windows.split(8), method, changes=changes, progress=bar, **choices)
        print(save_packed(model, args.out, dtype))
        _save_tokenizer(tokenizer, args.out)
        worst = max(reports, key=lambda report: report.loss)
        print(f"{len(reports)} layers; largest share of output lost: {worst.loss:.4f} in {worst.name}")
        _say_what_is_left(model)
        print(f"packed model: {args.out}")


def _rates(model: nn.Module, batches: Sequence[Tensor], budget: float, choices: dict) -> dict:
    """Changes for `quantize` that give each layer its rate: at most `budget` bits on average. Prints what it chose."""
    rates = allocate(model, batches, budget, progress=partial(tqdm, desc="bits", unit="layer"), **choices)
    counts = sorted(Counter(rates.values()).items())
    print(f"at most {budget:g} bits per weight: " + ", ".join(f"{n} layers at {rate:g}" for rate, n in counts))
    return {name: {"bits": rate} for name, rate in rates.items()}


def method_with(name: str, settings: list[str]) -> Method:
    """The method of this name with settings such as "dim=2". UsageError for one that it does not have."""
    kind, values = method_of(name), dict[str, Any]()
    plain = (bool, int, float, str)
    defaults = {field.name: field.default for field in fields(kind) if isinstance(field.default, plain)}
    for setting in settings:
        key, _, text = setting.partition("=")
        try:
            default = defaults[key]
            values[key] = {"True": True, "False": False}[text] if isinstance(default, bool) else type(default)(text)
        except (KeyError, ValueError):
            known = ", ".join(f"{key}={value}" for key, value in defaults.items())
            raise UsageError(f"--set {setting}: the settings of {name} and their defaults are {known}") from None
    return kind(**values)


def run_train(args: argparse.Namespace) -> None:
    """Train a packed model against the unquantized one and save it packed again."""
    with _new(args.out):
        config_of(args.folder)  # a wrong name is refused here, before the tokenizer is searched for on the hub
        device, dtype, tokenizer = choose_device(args.device), stored_dtype(args.folder), load_tokenizer(args.folder)
        student = load_packed(args.folder, trainable=True).to(device).float()
        name = str(args.teacher or BUNDLED)
        teacher, _ = load(name, device)
        text = load_text(args.text, tokenizer, model=student)
        scored, window = text.validation[:EVAL_TOKENS], _window(student)
        before = kl_to(teacher, student, scored, window)
        if before > FAR:
            print(f"note: the model is {before:.1f} nats per token from {name}. Was it made from another (--teacher)?")
        settings = {"teacher": name, "text": args.text, "tokens": args.tokens, "seed": args.seed}
        checkpoint = args.out.with_name(args.out.name + ".checkpoint.safetensors")
        begun = _same_run(checkpoint, settings | {"text_digest": text.digest, "model": _digest(args.folder)})
        say_if_repeated(text, args.tokens)
        data = batches(text.train, window, BATCH, torch.Generator().manual_seed(args.seed))
        _steps(student, teacher, data, max(1, args.tokens // (window * BATCH)), checkpoint)
        print(save_packed(student, args.out, dtype))
        _save_tokenizer(tokenizer, args.out)
        for file in (checkpoint, begun):
            file.unlink(missing_ok=True)
        print(f"packed model: {args.out}")
        del student  # else two models in training would be in memory
        with optional("the trained model is stored, but was not measured"):
            trained = load_packed(args.out, trainable=True).to(device).float()
            after = kl_to(teacher, trained, scored, window)
            print(f"KL to the unquantized model on validation text, nats per token: {before:.4f} -> {after:.4f}")


def _steps(student: nn.Module, teacher: nn.Module, data: Iterator, steps: int, checkpoint: Path) -> None:
    config = TrainConfig(steps, checkpoint_every=max(1, min(50, steps // 10)))
    print(config)
    with tqdm(total=steps, unit="step") as bar:

        def show(step: int, loss: float) -> None:
            bar.update(step + 1 - bar.n)

        train(student, data, config, teacher, checkpoint=checkpoint, on_step=show)


def run_export(args: argparse.Namespace) -> None:
    """Write a packed model as an ordinary checkpoint."""
    with _new(args.out):
        model, tokenizer = load_packed(args.folder), load_tokenizer(args.folder)
        export_dense(model, args.out)
        _save_tokenizer(tokenizer, args.out)
    print(f"ordinary checkpoint, as large as an unquantized one: {args.out}")


def run_generate(args: argparse.Namespace) -> None:
    """Continue a prompt greedily."""
    PackedLinear.compiled = args.compile
    model, tokenizer = _any(args.folder, choose_device(args.device)), load_tokenizer(args.folder)
    text = continue_prompt(model, tokenizer, args.prompt, args.tokens)
    print(tokenizer.decode(torch.cat(text), skip_special_tokens=True))


def run_bits(args: argparse.Namespace) -> None:
    """Print what a model costs on file."""
    print(bits_per_weight(_any(args.folder, torch.device("cpu")), stored_dtype(args.folder)))


def _any(name: str, device: torch.device) -> nn.Module:
    """The model of a packed or an ordinary folder, or of a name on the hub."""
    if Path(name).is_dir() and config_of(Path(name)).get("quantization_config"):
        return load_packed(name).to(device)
    return load(name, device)[0]


def _window(model: nn.Module) -> int:
    """Tokens of a window: WINDOW, or fewer for a model that reads fewer."""
    return min(WINDOW, longest_window(model) or WINDOW)


def _check_skip(model: nn.Module, skip: list[str]) -> None:
    names = [name for name, _ in linear_layers(model)]
    if unknown := [part for part in skip if not any(part in name for name in names)]:
        raise UsageError(
            f"--skip {' '.join(unknown)}: part of no linear layer's name; the first are {', '.join(names[:9])}"
        )


def _digest(folder: Path) -> str:
    """Which packed model this is, as 16 hex digits of its tensor files."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            hashlib.file_digest(stream, lambda: found)
    return found.hexdigest()[:16]


def _same_run(checkpoint: Path, settings: dict) -> Path:
    """Write the settings of a run beside its checkpoint; UsageError for a checkpoint that was made with others."""
    begun = checkpoint.with_suffix(".json")
    if checkpoint.exists():
        try:
            before = json.loads(begun.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        if before != settings:
            raise UsageError(
                f"{checkpoint} is of a run with other settings ({difference(before, settings)}): give those, or remove "
                "it to begin again"
            )
        print(f"going on from {checkpoint}")
    write_json(begun, settings)
    return begun


def _say_what_is_left(model: nn.Module) -> None:
    """Name the largest weight that stays as it is, except embeddings and the head, if such weights are many."""
    quantized = sum(layer.in_features * layer.out_features for _, layer in quant_layers(model))
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    inside = tuple(f"{name}." for name, _ in quant_layers(model))
    left = {
        name: p.numel() for name, p in model.named_parameters() if id(p) not in ends and not name.startswith(inside)
    }
    share = sum(left.values()) / max(1, quantized + sum(left.values()))
    if share > 0.05:
        print(
            f"note: {share:.0%} of the weights, embeddings and head not counted, stay as they are; the largest is "
            f"{max(left, key=left.__getitem__)}. Only linear layers are quantized, and not those that are skipped"
        )


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    with optional(f"the model is stored without its tokenizer: tokenizer.save_pretrained({str(folder)!r}) adds that"):
        tokenizer.save_pretrained(folder)


@contextmanager
def _new(folder: Path) -> Iterator[None]:
    """UsageError for a folder that exists, cannot be made or is being made by another process: before the work."""
    with ExitStack() as held:
        if folder.exists():
            raise UsageError(f"{folder} exists already: choose another --out, or remove it")
        try:
            held.enter_context(alone(folder))
            folder.mkdir()
            folder.rmdir()
        except OSError as error:
            raise UsageError(f"cannot write to {folder} ({error}): choose another --out") from error
        yield
