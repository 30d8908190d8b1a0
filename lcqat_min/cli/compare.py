"""The verb `compare`: a folder for the run, one arm after the other, then the table, sample texts and a picture.

    runs/<time>/compare.json     every finished row, as soon as it is known
               /compare.svg      the picture, at the end

What takes long is stored first. Samples and picture come after it, and if they fail that is a note: neither the rows
nor the arms that are still to come depend on them. A folder belongs to one process while that works in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..disk.locks import alone
from ..harness import report
from ..harness.compare import ARMS, Arm, Budget, Lab, continue_text, fitting, run_arm, settings
from ..harness.generate import encode_prompt
from ..harness.models import BUNDLED, DATA, choose_device, label, load
from ..harness.results import Results, optional, read_results, write_json
from ..harness.text import load_text, say_if_repeated


def run_compare(args: argparse.Namespace) -> None:
    """Quantize one model in every way, train, and show the figures beside the committed ones."""
    arms, seeds = arms_of(args.arms), list(dict.fromkeys(args.seeds))
    device = choose_device(args.device)
    if args.save:
        _check_save(args)
    with _folder(args) as folder:
        teacher, tokenizer = load(args.model or BUNDLED, device)
        encode_prompt(teacher, tokenizer, args.prompt)  # one that is unusable ends here, before anything is computed
        text = load_text(args.text, tokenizer, model=teacher)
        budget = Budget() if args.tokens is None else Budget(train_tokens=args.tokens)
        budget = fitting(budget, teacher, text)
        config = settings(arms, budget, label(args.model), args.text, args.prompt, text.digest)
        results = Results(folder / "compare.json", config)
        print(f"{config['model']} on {device}: {len(arms)} arms, seeds {seeds}, {budget}")
        print(f"writing to {folder}", flush=True)
        say_if_repeated(text, budget.train_tokens)
        _run_arms(Lab(teacher, tokenizer, text, budget, device), arms, seeds, args.prompt, results, folder)
        _show(results.data, args.prompt, folder)
        if args.save:
            save_committed(results.data)


def arms_of(names: list[str] | None) -> list[Arm]:
    """The arms of these names in the table's order, all for None; ValueError for a name of none."""
    known = [arm.name for arm in ARMS]
    if unknown := [name for name in names or [] if name not in known]:
        raise ValueError(f"unknown arm {', '.join(unknown)}; choose from {', '.join(known)}")
    return [arm for arm in ARMS if names is None or arm.name in names]


@contextmanager
def _folder(args: argparse.Namespace) -> Iterator[Path]:
    """The run's folder, for this process alone, and again gone if nothing was put into it."""
    folder = args.resume or new_folder(args.out)
    if not args.resume:
        pass
    elif args.out:
        raise ValueError("--out names a new run's folder and --resume that of an old one: give one of them")
    elif not (folder / "compare.json").exists():
        raise ValueError(
            f"nothing to resume: {folder / 'compare.json'} does not exist. Leave --resume out to start a run."
        )
    try:
        with alone(folder / "run"):
            yield folder
    finally:
        with suppress(OSError):  # there is something in it
            folder.rmdir()


def new_folder(out: Path | None) -> Path:
    """Make a folder that no other process has: `out`, else runs/<time>, with -2, -3, ... where that is taken.

    ValueError for one that exists or cannot be made.
    """
    name = Path("runs") / time.strftime("%Y-%m-%d_%H%M%S")
    for folder in [out] if out else itertools.chain([name], (Path(f"{name}-{n}") for n in itertools.count(2))):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"cannot write to {folder} ({error}): choose another --out") from error
    raise ValueError(f"{out} exists already: go on with its run by --resume, or choose another --out")


def _run_arms(lab: Lab, arms: list[Arm], seeds: list[int], prompt: str, results: Results, folder: Path) -> None:
    from tqdm import tqdm

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
            results.add(row, history)
            checkpoint.unlink(missing_ok=True)
            bar.set_postfix_str(
                f"KL {row['kl_ptq']:.4f}" + (f" -> {row['kl_qat']:.4f}" if row["kl_qat"] is not None else "")
            )
        if seed == seeds[0]:
            with optional(f"{arm.name} has no sample text; its row is stored"):
                results.add_sample(arm.name, continue_text(lab, model, prompt))


def _show(data: dict, prompt: str, folder: Path) -> None:
    committed, path = None, DATA / "results" / "compare.json"
    with optional("the committed figures are not beside these"):
        committed = read_results(path) if path.exists() else None
    print("\n" + report.beside(data, committed))
    print(f"\n{prompt!r}, continued by each arm (its first seed):")
    for arm, sample in data["samples"].items():
        print(f"  {arm:<15}{' '.join(sample.split())}")
    print(f"\ntable: {folder / 'compare.json'}")
    if any(row["arm"] != "fp" for row in data["rows"]):
        with optional("there is no picture; pip install matplotlib, if that is missing"):
            report.picture(data, folder / "compare.svg")
            print(f"picture: {folder / 'compare.svg'}")


def _check_save(args: argparse.Namespace) -> None:
    """ValueError, before any work, for a --save that would fail after it or put something else into the README."""
    if not (DATA / "README.md").is_file():
        raise ValueError(
            "--save renews the results that are committed in a clone, and this package is not in one: "
            f"leave --save out, or run in a clone (there is no {DATA / 'README.md'})"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--save draws a picture, and {sys.executable} cannot import matplotlib: install it first")
    other = [f"--{option}" for option in ("arms", "model", "tokens") if getattr(args, option) is not None]
    if other:
        raise ValueError(
            f"--save renews the results of all arms on the bundled model: leave out {' '.join(other)}, or "
            "leave out --save (every run has its own folder)"
        )


def save_committed(data: dict) -> None:
    """Renew the committed results, their picture and the README's table."""
    write_json(DATA / "results" / "compare.json", data)
    report.picture(data, DATA / "figures" / "compare.svg")
    report.renew_readme(data, DATA / "README.md")
    print("renewed results/compare.json, figures/compare.svg and the table in README.md")
