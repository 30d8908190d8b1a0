"""Nine settings of the learning rates for each trained method of `compare`, all on the same text: results/rates.json.

    python scripts/search_rates.py                        every method, one after the other
    python scripts/search_rates.py --methods sq free-vq   only these; several processes may share the work

A method with latents tries three rates for them and three for scales and codebooks; one without tries nine of the
latter. A run takes STEPS steps and is scored on validation text, so the table's test text stays unseen. Each finished
run is written at once and found again by the next start; delete the file to begin again. The best of each method, by KL
to three decimals (seeds differ by more), and the slowest of equal ones, is what lcqat_min/harness/compare.py says; a
test compares the two.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from pathlib import Path

from tqdm import tqdm

from lcqat_min.harness.compare import RECIPES, Budget, Experiment, Recipe, made_with, quantized
from lcqat_min.harness.evaluate import kl_to
from lcqat_min.harness.models import BUNDLED, choose_device, load
from lcqat_min.harness.results import add_rows, rows_of
from lcqat_min.harness.text import load_text
from lcqat_min.qat.config import TrainConfig
from lcqat_min.qat.loop import train
from lcqat_min.systems.free_vq import FreeVQ

RESULTS = Path(__file__).resolve().parents[1] / "results" / "rates.json"
LATENTS, SIDE = (0.001, 0.003, 0.01), (1e-3, 3e-3, 1e-2)  # bins a step; share of their size a step
LATENTS_ON_CODES = (0.003, 0.01, 0.03)  # latents that start on the codes are half a bin from any boundary
SIDE_ALONE = (5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4.5e-3, 6e-3, 1e-2, 2e-2)
STEPS, EVAL_TOKENS, SEED = 40, 8192, 0
TRAINED = {recipe.name: recipe for recipe in RECIPES if recipe.quant is not None and recipe.rates is not None}


def settings(recipe: Recipe) -> list[dict[str, float]]:
    """The nine settings that the search tries for a method."""
    if isinstance(recipe.quant, FreeVQ):
        return [{"lr_scales": side, "lr_codebooks": side} for side in SIDE_ALONE]
    grid = LATENTS_ON_CODES if getattr(recipe.quant, "start_on_codes", False) else LATENTS
    return [
        {"lr_latents": latents, "lr_scales": side, "lr_codebooks": side}
        for latents, side in itertools.product(grid, SIDE)
    ]


def search(experiment: Experiment, recipe: Recipe) -> None:
    """All settings of one method, from one quantized model."""
    config = made_with(experiment)
    if not (todo := [rates for rates in settings(recipe) if not is_done(recipe, rates, config)]):
        return
    ids = experiment.text.validation[:EVAL_TOKENS]
    begin = quantized(experiment, recipe, SEED)
    kl_ptq = kl_to(experiment.teacher, begin, ids, experiment.budget.window)
    for rates in tqdm(todo, desc=recipe.name, unit="run"):
        if is_done(recipe, rates, config):  # by another process meanwhile
            continue
        clock, model = time.perf_counter(), copy.deepcopy(begin)
        last = train(model, experiment.batches(SEED), TrainConfig(steps=STEPS, **rates), experiment.teacher)[-1]
        row = {
            "method": recipe.name,
            **rates,
            "seed": SEED,
            "tokens": last["tokens"],
            "kl_ptq": kl_ptq,
            "kl_qat": kl_to(experiment.teacher, model, ids, experiment.budget.window),
            "code_flips": last["flips"],
            "seconds": time.perf_counter() - clock,
        }
        add_rows(RESULTS, [row], config)


def is_done(recipe: Recipe, rates: dict[str, float], config: dict) -> bool:
    """Whether the file holds a run of this method with these rates; UsageError if the file is of other settings."""
    wanted = {"method": recipe.name, **rates}.items()
    return any(row.items() >= wanted for row in rows_of(RESULTS, config))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--methods", nargs="+", choices=TRAINED, default=list(TRAINED))
    options.add_argument("--device", default="cpu")
    args = options.parse_args()
    device = choose_device(args.device)
    teacher, tokenizer = load(BUNDLED, device)
    experiment = Experiment(teacher, tokenizer, load_text("docstrings", tokenizer), Budget(), device)
    for name in args.methods:
        search(experiment, TRAINED[name])


if __name__ == "__main__":
    main()
