"""The command `compare`: a folder for the run, one method after the other, then the table, sample texts and a picture.

    runs/<time>/compare.json     every finished row, as soon as it is known
               /compare.svg      the picture, at the end

What takes long is stored first. If samples or the picture fail, that is a note: neither the rows nor the remaining
methods depend on them. A folder belongs to one process while that works in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..disk.whole_file import alone
from ..errors import UsageError
from ..harness import report
from ..harness.compare import RECIPES, Budget, Experiment, Recipe, continue_text, fitting, run_recipe, settings
from ..harness.generate import encode_prompt
from ..harness.models import BUNDLED, DATA, choose_device, label, load
from ..harness.results import Results, optional, read_results, write_json
from ..harness.text import load_text, say_if_repeated


def run_compare(args: argparse.Namespace) -> None:
    """Quantize one model by every method, train, and show the figures beside the committed ones."""
    recipes, seeds = list(RECIPES) if args.save else recipes_of(args.methods), list(dict.fromkeys(args.seeds))
    device = choose_device(args.device)
    if args.save:
        _check_save(args)
    with _folder(args.out) as folder:
        teacher, tokenizer = load(args.model or BUNDLED, device)
        encode_prompt(teacher, tokenizer, args.prompt)  # an unusable one is refused here, before the work
        text = load_text(args.text, tokenizer, model=teacher)
        budget = Budget() if args.tokens is None else Budget(train_tokens=args.tokens)
        budget = fitting(budget, teacher, text)
        config = settings(recipes, budget, label(args.model), args.text, args.prompt, text.digest)
        results = Results(folder / "compare.json", config)
        write_json(results.path, results.data)  # --out goes on with it, even if the first method is stopped
        print(f"{config['model']} on {device}: {len(recipes)} methods, seeds {seeds}, {budget}")
        print(f"writing to {folder}", flush=True)
        say_if_repeated(text, budget.train_tokens)
        _run_all(Experiment(teacher, tokenizer, text, budget, device), recipes, seeds, args.prompt, results)
        _show(results.data, args.prompt, folder)
        if args.save:
            save_committed(results.data)


def recipes_of(names: list[str] | None) -> list[Recipe]:
    """The recipes of these methods in the table's order, for None those by default; UsageError for an unknown name."""
    known = [recipe.name for recipe in RECIPES]
    if unknown := [name for name in names or [] if name not in known]:
        raise UsageError(f"unknown method {', '.join(unknown)}; choose from {', '.join(known)}")
    return [recipe for recipe in RECIPES if (recipe.by_default if names is None else recipe.name in names)]


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """The run's folder, for this process alone; it is removed at the end if it is still empty."""
    folder = run_folder(out)
    try:
        with alone(folder / "run"):
            yield folder
    finally:
        with suppress(OSError):  # there is something in it
            folder.rmdir()


def run_folder(out: Path | None) -> Path:
    """`out`, made here or holding a run already; None: a new runs/<time>, with -2, -3, ... where that exists.

    UsageError for a folder of something else, or one that cannot be made.
    """
    name = Path("runs") / time.strftime("%Y-%m-%d_%H%M%S")
    for folder in [out] if out else itertools.chain([name], (Path(f"{name}-{n}") for n in itertools.count(2))):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"cannot write to {folder} ({error}): choose another --out") from error
    if out is not None and (out / "compare.json").is_file():
        return out
    raise UsageError(f"{out} exists already and holds no run of compare: choose another --out")


def _run_all(experiment: Experiment, recipes: list[Recipe], seeds: list[int], prompt: str, results: Results) -> None:
    from tqdm import tqdm

    ppl_fp = experiment.score(experiment.teacher)[0]
    todo = [(recipe, seed) for seed in seeds for recipe in recipes if not results.has(recipe.name, seed)]
    for number, (recipe, seed) in enumerate(todo, start=1):
        steps = experiment.budget.steps if recipe.rates is not None else 0
        checkpoint = results.path.with_name(f"{recipe.name}-{seed}.safetensors")
        with tqdm(total=steps, desc=f"[{number}/{len(todo)}] {recipe.name} seed {seed}", unit="step") as bar:
            row, model, history = run_recipe(
                experiment, recipe, seed, ppl_fp, checkpoint, lambda step, loss: bar.update(step + 1 - bar.n)
            )
            results.add(row, history)
            checkpoint.unlink(missing_ok=True)
            bar.set_postfix_str(f"KL {report.cell([row], 'kl_ptq', '.4f')} -> {report.cell([row], 'kl_qat', '.4f')}")
        if seed == seeds[0]:
            with optional(f"{recipe.name} has no sample text; its row is stored"):
                results.add_sample(recipe.name, continue_text(experiment, model, prompt))


def _show(data: dict, prompt: str, folder: Path) -> None:
    committed, path = None, DATA / "results" / "compare.json"
    with optional("the committed figures are not shown"):
        committed = read_results(path) if path.exists() else None
    print("\n" + report.beside(data, committed))
    print(f"\n{prompt!r}, continued by each method (its first seed):")
    for method, sample in data["samples"].items():
        print(f"  {method:<15}{' '.join(sample.split())}")
    print(f"\ntable: {folder / 'compare.json'}")
    if any(row["method"] != "fp" for row in data["rows"]):
        with optional("there is no picture; pip install matplotlib, if that is missing"):
            report.picture(data, folder / "compare.svg")
            print(f"picture: {folder / 'compare.svg'}")


def _check_save(args: argparse.Namespace) -> None:
    """UsageError, before any work, for a --save that would fail after it or change what the README is about."""
    if not (DATA / "README.md").is_file():
        raise UsageError(
            "--save renews the results that are committed in a clone, and this package is not in one: "
            f"leave --save out, or run in a clone (there is no {DATA / 'README.md'})"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"--save draws a picture, and {sys.executable} cannot import matplotlib: install it first")
    plain = {"methods": None, "model": None, "tokens": None, "text": "docstrings", "prompt": "Return the"}
    if other := [f"--{option}" for option, value in plain.items() if getattr(args, option) != value]:
        raise UsageError(
            f"--save renews the results of all methods on the bundled model: leave out {' '.join(other)}, or --save"
        )


def save_committed(data: dict) -> None:
    """Renew the committed results, their picture and the README's table."""
    write_json(DATA / "results" / "compare.json", data)
    report.picture(data, DATA / "figures" / "compare.svg")
    report.renew_readme(data, DATA / "README.md")
    print("renewed results/compare.json, figures/compare.svg and the table in README.md")
