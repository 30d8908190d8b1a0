"""The command line: `python -m lcqat_min <command>`. Each command is a thin layer over functions for Python code.

    compare                                     all methods on one model: table, picture, sample texts (cli/compare.py)
    quantize, train, export, generate, bits     from a model to a packed folder and on from there (cli/commands.py)
    check                                       is this machine ready? (cli/check.py)

Exit codes: 0, all went well; 1, `check` found a problem, or this package has a bug, whose traceback is shown; 2, a
mistake of the caller (an unknown name, a missing file or device, an unusable text), reported in one line on stderr;
130, stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from ..errors import UsageError

SEEDS = 2**63  # torch's generators take seeds below it, also with what is added to tell their uses apart
USAGE = (UsageError, OSError, ImportError, FloatingPointError)
ALSO_USAGE = ("SafetensorError", "OutOfMemoryError")  # a full disk, a full GPU; by name, as safetensors is optional


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):  # a console that cannot print a character shows its escape
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parser().parse_args(argv)
    module, function = args.run.split(".")
    try:
        return getattr(import_module(f".{module}", __package__), function)(args) or 0
    except KeyboardInterrupt:
        print("\nlcqat: stopped. What is finished is kept, and of training the last checkpoint.", file=sys.stderr)
        return 130
    except Exception as error:
        usage = _is_usage(error)
        if args.traceback or not usage:
            traceback.print_exc()
        hint = f". Install it for {sys.executable}, or set up .venv as README.md says"
        said = f"{error}{hint}" if isinstance(error, ImportError) else str(error)
        print(f"lcqat: {said if usage else 'this is a bug: please report it, with the lines above'}", file=sys.stderr)
        return 2 if usage else 1


def _is_usage(error: Exception) -> bool:
    if isinstance(error, ImportError) and str(error.name).startswith("lcqat_min"):
        return False  # of a file or name of this package
    return isinstance(error, USAGE) or type(error).__name__ in ALSO_USAGE or "InvalidCxxCompiler" in str(error)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="python -m lcqat_min",
        description="2-bit vector-quantization-aware training, small enough to read. Everything works offline with the "
        "bundled model and text.",
    )
    top.add_argument("--traceback", action="store_true", help="show the traceback of every error")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: str, summary: str, description: str | None = None) -> argparse.ArgumentParser:
        """run: "module.function" of this folder, imported when it is called, so that `check` needs no package."""
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawTextHelpFormatter, description=description
        )
        command.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        command.set_defaults(run=run)
        return command

    _add_compare(add)
    _add_makers(add)
    _add_users(add)
    return top


def _add_compare(add: Callable) -> None:
    compare = add("compare", "compare.run_compare", "all methods on one model", description=_compare_help())
    _model(compare)
    _text_and_device(compare)
    compare.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="only these rows of the table (default: all that are not slow)"
    )
    compare.add_argument("--seeds", nargs="+", type=seed, default=[0], metavar="N", help="one run each (default: 0)")
    compare.add_argument("--tokens", type=positive, metavar="N", help="training tokens per method (default: 61440)")
    compare.add_argument("--prompt", default="Return the", help="continued by each method (default: %(default)r)")
    compare.add_argument("--out", type=path, metavar="FOLDER", help="a new folder, or that of a run to go on with")
    compare.add_argument("--save", action="store_true", help="renew the committed results, their picture and table")


def _compare_help() -> str:
    from ..harness.compare import RECIPES

    only = {True: "", False: "; only if named"}
    methods = "\n".join(f"  {recipe.name:<15}{recipe.what}{only[recipe.by_default]}" for recipe in RECIPES)
    return (
        "Quantize one language model to 2 bits by every method, train each for the same tokens, and print one table.\n"
        "A run writes to --out (default: runs/<time>). Started again with that folder, it goes on from what is there.\n"
        "Its figures are shown beside the committed ones, where those are of the same model, text and tokens.\n\n"
        f"methods:\n{methods}"
    )


TRAIN_HELP = """\
Train a packed model against the unquantized one and save it packed again. A run that was stopped goes on when it is
started again with the same options.

A packed folder holds codes and no latents, so training starts with each latent on its code. In Python, quantize(model)
leaves latents at the unrounded weights, within the bins of their codes. So the two ways give different models."""


def _add_makers(add: Callable) -> None:
    """The commands that make a packed model."""
    from ..systems.table import METHODS

    quantize = add("quantize", "commands.run_quantize", "round a model to 2 bits and save it packed")
    _model(quantize)
    _text_and_device(quantize)
    _new_folder(quantize, "the packed model")
    quantize.add_argument("--method", choices=METHODS, default="lcqat", help="(default: %(default)s)")
    quantize.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings: codebook=lattice dim=2")
    rates = "of the codes, on average, at most: 1 to 4 (default: 2); other averages than 1, 1.5, 2, 2.5, 3, 4 mix these"
    quantize.add_argument("--bits", type=float, metavar="BITS", help=f"bits per weight {rates}")
    quantize.add_argument(
        "--mixed", action="store_true", help="mix rates for any --bits: more where the loss is larger"
    )
    quantize.add_argument("--skip", nargs="+", type=name, default=[], metavar="PART", help="parts of names of layers")
    quantize.add_argument("--tokens", type=positive, default=32768, help="calibration tokens (default: %(default)s)")
    quantize.add_argument("--seed", type=seed, default=0, help="(default: 0)")

    train = add(
        "train", "commands.run_train", "train a packed model against the unquantized one", description=TRAIN_HELP
    )
    train.add_argument("folder", type=path, help="packed model")
    train.add_argument("--teacher", type=name, help="what it was made from (default: the bundled model)")
    _text_and_device(train)
    _new_folder(train, "the trained packed model")
    train.add_argument("--tokens", type=positive, default=61440, help="training tokens (default: %(default)s)")
    train.add_argument("--seed", type=seed, default=0, help="of the order of the text (default: 0)")


def _add_users(add: Callable) -> None:
    """The commands that use one, and `check`."""
    export = add("export", "commands.run_export", "write a packed model as an ordinary checkpoint for other tools")
    export.add_argument("folder", type=path, help="packed model")
    _new_folder(export, "the checkpoint")

    generate = add("generate", "commands.run_generate", "continue a prompt")
    generate.add_argument("folder", type=name, help="packed or ordinary model")
    generate.add_argument("--prompt", default="Return the", help="(default: %(default)r)")
    generate.add_argument("--tokens", type=positive, default=40, help="new tokens (default: %(default)s)")
    _device(generate)
    generate.add_argument("--compile", action="store_true", help="packed, on a CPU: by torch.compile; slow to start")

    bits = add("bits", "commands.run_bits", "what a model costs on file")
    bits.add_argument("folder", type=name, help="packed or ordinary model")

    add("check", "check.run_check", "is this machine ready? Says what to do where it is not")


def _model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", type=name, help="a Hugging Face name or a folder (default: the bundled model)")


def _text_and_device(command: argparse.ArgumentParser) -> None:
    sources = "docstrings (default; offline), wikitext2, or a text file or folder"
    command.add_argument("--text", type=name, default="docstrings", metavar="SOURCE", help=sources)
    _device(command)


def _device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")


def _new_folder(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--out", type=path, required=True, metavar="FOLDER", help=f"{what}, a new folder")


def positive(text: str) -> int:
    """An option's value as an integer of at least 1."""
    return _whole(text, 1, sys.maxsize)


def seed(text: str) -> int:
    """An option's value as a seed that torch takes."""
    return _whole(text, 0, SEEDS - 1)


def _whole(text: str, low: int, high: int) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}, at most {high}")
    return int(text)


def name(text: str) -> str:
    """An option's value as a name or the path of a file or folder, ~ written out."""
    if not text.strip():
        raise argparse.ArgumentTypeError("nothing was given: a name or a path is needed")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.exists(expanded):
        raise argparse.ArgumentTypeError(f"{text!r} names no home folder that is known here: write the whole path")
    return expanded


def path(text: str) -> Path:
    """An option's value as a path, ~ written out."""
    return Path(name(text))
