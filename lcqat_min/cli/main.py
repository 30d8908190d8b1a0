"""The command line: `python -m lcqat_min <verb>`. Each verb is a thin layer over a function that Python code can call.

    compare     every way to 2 bits on one model: the table, the picture, sample texts
    quantize, train, export, generate, bits: see cli/commands.py
    check       will it all run on this machine? see cli/check.py

Mistakes of the caller (unknown names, missing files or devices, unusable text) end in one line on stderr and exit
code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

SEEDS = 2**63  # torch's generators take seeds below it, also with what is added to tell their uses apart


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):  # a console of few letters shows the others as escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except ImportError as error:
        return _say(f"{error}. Install what is missing for {sys.executable}, or set up .venv as README.md says")
    except (ValueError, OSError, FloatingPointError) as error:
        return _say(error)
    except Exception as error:
        if type(error).__name__ not in ("SafetensorError", "OutOfMemoryError"):  # full disk, full GPU: no OSErrors
            raise
        return _say(error)
    except KeyboardInterrupt:
        print("\nlcqat: stopped. What is finished is kept, and of training the last checkpoint.", file=sys.stderr)
        return 130


def _say(error: object) -> int:
    print(f"lcqat: {error}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    top = argparse.ArgumentParser(
        prog="python -m lcqat_min",
        description="2-bit vector-quantization-aware training, small "
        "enough to read. Everything works offline with the bundled model and text.",
    )
    verbs = top.add_subparsers(title="verbs", required=True, metavar="VERB")
    compare = verbs.add_parser(
        "compare",
        help="every way to 2 bits on one model",
        formatter_class=argparse.RawTextHelpFormatter,
        description=_compare_help(),
    )
    common(compare)
    compare.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms (default: all)")
    compare.add_argument("--seeds", nargs="+", type=seed, default=[0], metavar="N", help="one run each (default: 0)")
    compare.add_argument(
        "--tokens", type=positive, default=None, metavar="N", help="training tokens per arm (default: 61440)"
    )
    compare.add_argument(
        "--prompt", default="Return the", metavar="TEXT", help="continued by each arm (default: %(default)r)"
    )
    compare.add_argument("--out", type=path, metavar="FOLDER", help="the run, a new folder (default: runs/<time>)")
    compare.add_argument("--resume", type=path, metavar="RUN", help="go on with an interrupted run's folder")
    compare.add_argument(
        "--save",
        action="store_true",
        help="renew results/compare.json, figures/compare.svg and the README's\n"
        "table (for the results that are committed)",
    )
    compare.set_defaults(run=_run_compare)
    _making(verbs)
    _using(verbs)
    return top


def _making(verbs: argparse._SubParsersAction) -> None:
    """The verbs that make a packed model."""
    from ..ptq.lcqat import CODEBOOKS, LCQAT
    from ..ptq.method import ROTATIONS
    from . import commands as do

    default = LCQAT()
    quantize = verbs.add_parser("quantize", help="round a model to 2 bits and save it packed")
    common(quantize)
    quantize.add_argument("--out", type=path, required=True, metavar="FOLDER", help="the packed model, a new folder")
    quantize.add_argument("--codebook", choices=CODEBOOKS, default=default.codebook, help="(default: %(default)s)")
    quantize.add_argument("--dim", type=int, default=default.dim, help="weights per vector (default: %(default)s)")
    quantize.add_argument("--rotate", choices=ROTATIONS, default=default.rotate, help="(default: %(default)s)")
    quantize.add_argument(
        "--skip", nargs="+", type=name, default=[], metavar="PART", help="parts of names of layers to leave out"
    )
    quantize.add_argument("--tokens", type=positive, default=32768, help="calibration tokens (default: %(default)s)")
    quantize.add_argument("--seed", type=seed, default=0, help="(default: 0)")
    quantize.set_defaults(run=do.run_quantize)

    train = verbs.add_parser("train", help="train a packed model against the unquantized one")
    train.add_argument("folder", type=path, help="packed model")
    train.add_argument(
        "--teacher", type=name, metavar="NAME", help="what it was made from (default: the bundled model)"
    )
    train.add_argument(
        "--out", type=path, required=True, metavar="FOLDER", help="the trained packed model, a new folder"
    )
    train.add_argument("--tokens", type=positive, default=61440, help="training tokens (default: %(default)s)")
    train.add_argument("--seed", type=seed, default=0, help="of the order of the text (default: 0)")
    common(train, model=False)
    train.set_defaults(run=do.run_train)


def _using(verbs: argparse._SubParsersAction) -> None:
    """The verbs that use one, and `check`."""
    from . import commands as do

    export = verbs.add_parser("export", help="write a packed model as an ordinary checkpoint for other tools")
    export.add_argument("folder", type=path, help="packed model")
    export.add_argument("--out", type=path, required=True, metavar="FOLDER", help="the checkpoint, a new folder")
    export.set_defaults(run=do.run_export)

    generate = verbs.add_parser("generate", help="continue a prompt")
    generate.add_argument("folder", type=name, help="packed or ordinary model")
    generate.add_argument("--prompt", default="Return the", help="(default: %(default)r)")
    generate.add_argument("--tokens", type=positive, default=40, help="new tokens (default: %(default)s)")
    generate.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    generate.add_argument("--compile", action="store_true", help="packed, on a CPU: by torch.compile; slow to start")
    generate.set_defaults(run=do.run_generate)

    bits = verbs.add_parser("bits", help="what a model costs on file")
    bits.add_argument("folder", type=name, help="packed or ordinary model")
    bits.set_defaults(run=do.run_bits)

    check = verbs.add_parser("check", help="will it all run on this machine? Names the remedy")
    check.set_defaults(run=run_check)


def positive(text: str) -> int:
    """An option's value as an integer of at least 1."""
    return _whole(text, 1, sys.maxsize)


def seed(text: str) -> int:
    """An option's value as a seed that torch takes."""
    return _whole(text, 0, SEEDS - 1)


def _whole(text: str, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}, at most {most}")
    return int(text)


def name(text: str) -> str:
    """An option's value as a name or the path of a file or folder, ~ written out."""
    if not text.strip():
        raise argparse.ArgumentTypeError("nothing was given: a name or a path is needed")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.exists(expanded):
        raise argparse.ArgumentTypeError(f"{text!r} is in no home that is known here: write the whole path")
    return expanded


def path(text: str) -> Path:
    """An option's value as a path, ~ written out."""
    return Path(name(text))


def common(verb: argparse.ArgumentParser, model: bool = True) -> None:
    """Options that several verbs share."""
    if model:
        verb.add_argument(
            "--model", type=name, metavar="NAME", help="a Hugging Face name or a folder (default: the bundled model)"
        )
    verb.add_argument(
        "--text",
        type=name,
        default="docstrings",
        metavar="SOURCE",
        help="docstrings (offline), wikitext2, or a text file or\nfolder (default: docstrings)",
    )
    verb.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")


def _compare_help() -> str:
    from ..harness.compare import ARMS

    arms = "\n".join(f"  {arm.name:<15}{arm.what}" for arm in ARMS)
    return (
        "Quantize one language model to 2 bits in every way, train each for the same tokens, and print one table.\n"
        "A run writes to runs/<time>/ and shows its figures beside the committed ones, where those are of the same\n"
        "model, text and tokens.\n\narms:\n" + arms
    )


def run_check(args: argparse.Namespace) -> int:
    """The verb `check`: 0 when all that is needed is there, else 1."""
    from .check import check

    return 0 if check() else 1


def _run_compare(args: argparse.Namespace) -> None:
    from .compare import run_compare

    run_compare(args)
