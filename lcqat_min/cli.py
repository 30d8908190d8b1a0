"""The command line: `python -m lcqat_min <verb>`. Each verb is a thin layer over a function that Python code can call.

    compare     every way to 2 bits on one model: the table, the picture, sample texts
    quantize, train, export, generate, bits: see verbs.py
    check       will it all run on this machine? see preflight.py

Mistakes of the caller (unknown names, missing files or devices, unusable text) end in one line on stderr and exit
code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"lcqat: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # a full disk, which is not an OSError there
            raise
        print(f"lcqat: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nlcqat: stopped. What is finished is kept, and of training the last checkpoint.", file=sys.stderr)
        return 130


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
    compare.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="one run each (default: 0)")
    compare.add_argument(
        "--tokens", type=positive, default=None, metavar="N", help="training tokens an arm (default: 61440)"
    )
    compare.add_argument(
        "--prompt", default="Return the", metavar="TEXT", help="continued by each arm (default: %(default)r)"
    )
    compare.add_argument("--resume", type=Path, metavar="RUN", help="go on with an interrupted run's folder")
    compare.add_argument(
        "--save",
        action="store_true",
        help="renew results/compare.json, figures/compare.svg and the README's\n"
        "table (for the results that are committed)",
    )
    compare.set_defaults(run=run_compare)
    _other_verbs(verbs)
    return top


def _other_verbs(verbs: argparse._SubParsersAction) -> None:
    from . import verbs as do
    from .ptq import CODEBOOKS, ROTATIONS, QuantConfig

    default = QuantConfig()
    quantize = verbs.add_parser("quantize", help="round a model to 2 bits and save it packed")
    common(quantize)
    quantize.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the packed model, a new folder")
    quantize.add_argument("--codebook", choices=CODEBOOKS, default=default.codebook, help="(default: %(default)s)")
    quantize.add_argument("--dim", type=int, default=default.dim, help="weights in a vector (default: %(default)s)")
    quantize.add_argument("--rotate", choices=ROTATIONS, default=default.rotate, help="(default: %(default)s)")
    quantize.add_argument("--skip", nargs="+", default=[], metavar="PART", help="parts of names of layers to leave out")
    quantize.add_argument("--tokens", type=positive, default=32768, help="calibration tokens (default: %(default)s)")
    quantize.add_argument("--seed", type=int, default=0, help="(default: 0)")
    quantize.set_defaults(run=do.run_quantize)

    train = verbs.add_parser("train", help="train a packed model against the unquantized one")
    train.add_argument("folder", type=Path, help="packed model")
    train.add_argument("--teacher", metavar="NAME", help="what it was made from (default: the bundled model)")
    train.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the trained packed model, a new folder"
    )
    train.add_argument("--tokens", type=positive, default=61440, help="training tokens (default: %(default)s)")
    train.add_argument("--seed", type=int, default=0, help="of the order of the text (default: 0)")
    common(train, model=False)
    train.set_defaults(run=do.run_train)

    export = verbs.add_parser("export", help="write a packed model as an ordinary checkpoint for other tools")
    export.add_argument("folder", type=Path, help="packed model")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the checkpoint, a new folder")
    export.set_defaults(run=do.run_export)

    generate = verbs.add_parser("generate", help="continue a prompt")
    generate.add_argument("folder", help="packed or ordinary model")
    generate.add_argument("--prompt", default="Return the", help="(default: %(default)r)")
    generate.add_argument("--tokens", type=positive, default=40, help="new tokens (default: %(default)s)")
    generate.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    generate.add_argument("--compile", action="store_true", help="packed, on a CPU: by torch.compile; slow to start")
    generate.set_defaults(run=do.run_generate)

    bits = verbs.add_parser("bits", help="what a model costs on file")
    bits.add_argument("folder", help="packed or ordinary model")
    bits.set_defaults(run=do.run_bits)

    check = verbs.add_parser("check", help="will it all run on this machine? Names the remedy")
    check.set_defaults(run=run_check)


def positive(text: str) -> int:
    """An option's value as an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def common(verb: argparse.ArgumentParser, model: bool = True) -> None:
    """Options that several verbs share."""
    if model:
        verb.add_argument(
            "--model", default=None, metavar="NAME", help="a Hugging Face name or a folder (default: the bundled model)"
        )
    verb.add_argument(
        "--text",
        default="docstrings",
        metavar="SOURCE",
        help="docstrings (offline), wikitext2, or a text file or\nfolder (default: docstrings)",
    )
    verb.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")


def _compare_help() -> str:
    from .compare import ARMS

    arms = "\n".join(f"  {arm.name:<15}{arm.what}" for arm in ARMS)
    return (
        "Quantize one language model to 2 bits in every way, train each for the same tokens, and print one table.\n"
        "A run writes to runs/<time>/ and shows its figures beside the committed ones.\n\narms:\n" + arms
    )


def run_check(args: argparse.Namespace) -> int:
    """The verb `check`: 0 when all that is needed is there, else 1."""
    from .preflight import check

    return 0 if check() else 1


def run_compare(args: argparse.Namespace) -> int:
    """The verb `compare`."""
    from . import report
    from .compare import ARMS, Budget, Lab, settings
    from .hub import BUNDLED, choose_device, load
    from .results import Results, read_results
    from .text import load_text

    known = {arm.name: arm for arm in ARMS}
    if unknown := [name for name in args.arms or [] if name not in known]:
        raise ValueError(f"unknown arm {', '.join(unknown)}; choose from {', '.join(known)}")
    arms = [arm for arm in ARMS if not args.arms or arm.name in args.arms]
    budget = Budget() if args.tokens is None else Budget(train_tokens=args.tokens)
    device = choose_device(args.device)
    name = args.model or f"models/{BUNDLED.name}"
    folder = args.resume or ROOT / "runs" / time.strftime("%Y-%m-%d_%H%M%S")
    if args.resume and not (folder / "compare.json").exists():
        raise ValueError(
            f"nothing to resume: {folder / 'compare.json'} does not exist. Leave --resume out to start a run."
        )
    results = Results(folder / "compare.json", settings(arms, budget, name, args.text, args.prompt))
    print(f"{name} on {device}: {len(arms)} arms, seeds {args.seeds}, {budget}\nwriting to {folder}", flush=True)
    teacher, tokenizer = load(args.model or BUNDLED, device)
    lab = Lab(teacher, tokenizer, load_text(args.text, tokenizer), budget, device)
    _run_arms(lab, arms, args.seeds, args.prompt, results, folder)
    committed = ROOT / "results" / "compare.json"
    print("\n" + report.beside(results.data, read_results(committed) if committed.exists() else {"rows": []}))
    print(f"\n{args.prompt!r}, continued by each arm (seed {args.seeds[0]}):")
    for arm, sample in results.data["samples"].items():
        print(f"  {arm:<15}{' '.join(sample.split())}")
    print(f"\ntable: {folder / 'compare.json'}")
    if any(row["arm"] != "fp" for row in results.data["rows"]):
        report.picture(results.data, folder / "compare.svg")
        print(f"picture: {folder / 'compare.svg'}")
    if args.save:
        save_committed(results.data)
    return 0


def save_committed(data: dict) -> None:
    """Renew the committed results, their picture and the README's table."""
    from . import report
    from .results import write_json

    report.renew_readme(data, ROOT / "README.md")
    report.picture(data, ROOT / "figures" / "compare.svg")
    write_json(ROOT / "results" / "compare.json", data)
    print("renewed results/compare.json, figures/compare.svg and the table in README.md")


def _run_arms(lab, arms: list, seeds: list[int], prompt: str, results, folder: Path) -> None:
    from tqdm import tqdm

    from .compare import continue_text, run_arm

    quiet = os.environ.get("LCQAT_QUIET") == "1"
    ppl_fp = lab.score(lab.teacher)[0]
    todo = [(arm, seed) for seed in seeds for arm in arms if not results.has(arm.name, seed)]
    for number, (arm, seed) in enumerate(todo, start=1):
        steps = lab.budget.steps if arm.rates is not None else 0
        checkpoint = folder / f"{arm.name}-{seed}.safetensors"
        with tqdm(
            total=steps, desc=f"[{number}/{len(todo)}] {arm.name} seed {seed}", disable=quiet, unit="step"
        ) as bar:
            row, model, history = run_arm(
                lab, arm, seed, ppl_fp, checkpoint, lambda step, loss: bar.update(step + 1 - bar.n)
            )
            bar.set_postfix_str(
                f"KL {row['kl_ptq']:.4f}" + (f" -> {row['kl_qat']:.4f}" if row["kl_qat"] is not None else "")
            )
        results.add(row, history, continue_text(lab, model, prompt) if seed == seeds[0] else None)
        checkpoint.unlink(missing_ok=True)
