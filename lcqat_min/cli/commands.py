"""The verbs beside `compare`: from a model's name to a packed folder, on to training, and out again.

    quantize   model  -> packed folder       round with error feedback (ptq/model.py)
    train      packed -> packed              distil the unquantized model into it (qat/loop.py)
    export     packed -> ordinary folder     for tools that do not know this package
    generate   packed or ordinary -> text
    bits       packed or ordinary -> what it costs

Each function takes the parsed arguments of cli/main.py and prints what it did.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from ..disk.locks import alone
from ..harness.evaluate import kl_to
from ..harness.generate import continue_prompt
from ..harness.models import BUNDLED, choose_device, load
from ..harness.results import difference, optional, write_json
from ..harness.text import batches, load_text, sample_windows, say_if_repeated
from ..language_model import longest_window
from ..layer.linear import quant_layers
from ..ptq.lcqat import LCQAT
from ..ptq.model import quantize
from ..ptq.select import linear_layers
from ..qat.config import TrainConfig
from ..qat.loop import train

WINDOW, BATCH = 256, 4
EVAL_TOKENS = 16_384
FAR = 2.0  # nats per token: more than rounding to 2 bits moves a model


def run_quantize(args: argparse.Namespace) -> None:
    """Quantize a model and save it packed."""
    config = LCQAT(codebook=args.codebook, dim=args.dim, rotate=args.rotate)
    with _new(args.out):
        _quantize(args, config)


def _quantize(args: argparse.Namespace, config: LCQAT) -> None:
    from tqdm import tqdm

    from ..packing.files import save_packed

    name = args.model or BUNDLED
    model, tokenizer = load(name, choose_device(args.device))
    names, dtype = [name for name, _ in linear_layers(model)], _dtype_of(name)
    if unknown := [part for part in args.skip if not any(part in name for name in names)]:
        raise ValueError(
            f"--skip {' '.join(unknown)}: part of no linear layer's name; the first are {', '.join(names[:9])}"
        )
    text = load_text(args.text, tokenizer, model=model)
    window, generator = _window(model), torch.Generator().manual_seed(args.seed)
    windows = sample_windows(text.train, max(1, min(args.tokens, len(text.train)) // window), window, generator)
    print(f"{config}, calibrated on {windows.numel()} tokens")
    reports = quantize(
        model,
        windows.split(8),
        config,
        skip=("lm_head", *args.skip),
        seed=args.seed,
        progress=lambda steps: tqdm(steps, disable=_quiet(), unit="layer"),
    )
    print(save_packed(model, args.out, dtype))
    _save_tokenizer(tokenizer, args.out)
    worst = max(reports, key=lambda report: report.loss)
    print(f"{len(reports)} layers; largest share of output lost: {worst.loss:.4f} in {worst.name}")
    _say_what_is_left(model)
    print(f"packed model: {args.out}")


def run_train(args: argparse.Namespace) -> None:
    """Train a packed model against the unquantized one and save it packed again."""
    with _new(args.out):
        _train(args)


def _train(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..packing.files import save_packed
    from ..packing.format import config_of

    config_of(args.folder)  # a wrong name ends here, before the tokenizer is looked for on the hub
    device, dtype = choose_device(args.device), _dtype_of(args.folder)
    tokenizer = _tokenizer(args.folder)
    student = _packed(args.folder, device, trainable=True).float()
    teacher, _ = load(args.teacher or BUNDLED, device)
    text = load_text(args.text, tokenizer, model=student)
    window = _window(student)
    steps = max(1, args.tokens // (window * BATCH))
    config = TrainConfig(steps, checkpoint_every=max(1, min(50, steps // 10)))
    print(config)
    say_if_repeated(text, args.tokens)
    data = batches(text.train, window, BATCH, torch.Generator().manual_seed(args.seed))
    judged = text.validation[:EVAL_TOKENS]
    before = kl_to(teacher, student, judged, window)
    if before > FAR:
        print(
            f"note: the model is {before:.1f} nats per token from {args.teacher or BUNDLED}. Is that what it was "
            "made from? --teacher names another."
        )
    checkpoint = args.out.with_name(args.out.name + ".checkpoint.safetensors")
    begun = _same_run(
        checkpoint,
        {
            "model": config_of(args.folder)["quantization_config"].get("sha256"),
            "teacher": str(args.teacher or BUNDLED),
            "text": args.text,
            "tokens": args.tokens,
            "seed": args.seed,
            "text_digest": text.digest,
        },
    )
    with tqdm(total=config.steps, disable=_quiet(), unit="step") as bar:
        train(
            student, data, config, teacher, checkpoint=checkpoint, on_step=lambda step, _: bar.update(step + 1 - bar.n)
        )
    print(save_packed(student, args.out, dtype))
    _save_tokenizer(tokenizer, args.out)
    for file in (checkpoint, begun):
        file.unlink(missing_ok=True)
    print(f"packed model: {args.out}")
    del student  # else two models in training would be held
    with optional("the trained model is stored, but was not measured"):
        after = kl_to(teacher, _packed(args.out, device, trainable=True).float(), judged, window)
        print(f"KL to the unquantized model on validation text, nats per token: {before:.4f} -> {after:.4f}")


def run_export(args: argparse.Namespace) -> None:
    """Write a packed model as an ordinary checkpoint."""
    from ..packing.files import export_dense

    with _new(args.out):
        model, tokenizer = _packed(args.folder, torch.device("cpu")), _tokenizer(args.folder)
        export_dense(model, args.out)
        _save_tokenizer(tokenizer, args.out)
    print(f"ordinary checkpoint, as large as an unquantized one: {args.out}")


def run_generate(args: argparse.Namespace) -> None:
    """Continue a prompt greedily."""
    from ..packing.layer import PackedLinear

    if not args.prompt:
        raise ValueError("the prompt is empty: give at least one word to continue")
    PackedLinear.compiled = args.compile
    model, tokenizer = _any(args.folder, choose_device(args.device)), _tokenizer(args.folder)
    text = continue_prompt(model, tokenizer, args.prompt, args.tokens)
    print(tokenizer.decode(torch.cat(text), skip_special_tokens=True))


def run_bits(args: argparse.Namespace) -> None:
    """Print what a model costs on file."""
    from ..packing.size import bits_per_weight

    print(bits_per_weight(_any(args.folder, torch.device("cpu")), _dtype_of(args.folder)))


def _dtype_of(name: str | Path) -> torch.dtype:
    """What the numbers of a model are stored in. They are loaded in fp32, to be trained, and saved in that again."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(name), trust_remote_code=False).dtype or torch.float32


def _window(model: nn.Module) -> int:
    """Tokens of a window: WINDOW, or fewer for a model that reads fewer."""
    return min(WINDOW, longest_window(model) or WINDOW)


def _same_run(checkpoint: Path, settings: dict) -> Path:
    """Write beside a checkpoint what its run was begun with; ValueError where that was something else."""
    begun = checkpoint.with_suffix(".json")
    if checkpoint.exists():
        before = json.loads(begun.read_text(encoding="utf-8")) if begun.exists() else settings
        if before != settings:
            raise ValueError(
                f"{checkpoint} is of a run with other settings ({difference(before, settings)}): give "
                "those, or remove it to begin anew"
            )
        print(f"going on from {checkpoint}")
    write_json(begun, settings)
    return begun


def _say_what_is_left(model: nn.Module) -> None:
    """Name the largest weight that stays as it is, beside embeddings and the head, if all of those are many."""
    quantized = sum(layer.in_features * layer.out_features for _, layer in quant_layers(model))
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    inside = {f"{name}." for name, _ in quant_layers(model)}
    left = {
        name: p.numel()
        for name, p in model.named_parameters()
        if id(p) not in ends and not any(name.startswith(part) for part in inside)
    }
    share = sum(left.values()) / max(1, quantized + sum(left.values()))
    if share > 0.05:
        largest = max(left, key=left.get)
        print(
            f"note: {share:.0%} of the weights outside of embeddings and head stay as they are, {largest} the "
            "largest: only linear layers are quantized, and not those that are skipped"
        )


def _packed(folder: Path, device: torch.device, trainable: bool = False) -> nn.Module:
    from ..packing.files import load_packed

    return load_packed(folder, trainable=trainable).to(device)


def _any(name: str, device: torch.device) -> nn.Module:
    """The model of a packed or an ordinary folder, or of a name on the hub."""
    from ..packing.format import config_of

    if Path(name).is_dir() and config_of(Path(name)).get("quantization_config"):
        return _packed(Path(name), device)
    return load(name, device)[0]


def _tokenizer(folder: Path) -> object:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no tokenizer: tokenizer.save_pretrained({str(folder)!r}) puts one beside the "
            f"model. transformers says: {str(error).splitlines()[0][:100]}"
        ) from error


def _save_tokenizer(tokenizer: object, folder: Path) -> None:
    with optional(f"the model is stored without its tokenizer: tokenizer.save_pretrained({str(folder)!r}) adds that"):
        tokenizer.save_pretrained(folder)


@contextmanager
def _new(folder: Path) -> Iterator[None]:
    """Refuse a folder that exists, cannot be made or is being made by another process, now and not after the work."""
    with ExitStack() as held:
        if folder.exists():
            raise ValueError(f"{folder} exists already: choose another --out, or remove it")
        try:
            held.enter_context(alone(folder))
            folder.mkdir()
            folder.rmdir()
        except OSError as error:
            raise ValueError(f"cannot write to {folder} ({error}): choose another --out") from error
        yield


def _quiet() -> bool:
    return os.environ.get("LCQAT_QUIET") == "1"
