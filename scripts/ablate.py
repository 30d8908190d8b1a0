"""What each part is worth: one switch at a time (results/ablations.json), more tokens (results/longer.json), the
trellis.

    python scripts/ablate.py switches      `lcqat-planes` with one setting changed, same tokens; three seeds unchanged
    python scripts/ablate.py longer        some methods with five times the tokens, scored on the way
    python scripts/ablate.py trellis       the linear trellis and its rates beside other codebooks
    (results/trellis.json)

All are scored on validation text, so their figures are not those of the table, whose test text stays unseen. Finished
rows are written at once and found again by the next start; delete the file to begin again. The seeds of the unchanged
method show how large a difference has to be to mean anything.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from lcqat_min.harness.compare import RECIPES, Budget, Experiment, Recipe, made_with, quantized
from lcqat_min.harness.evaluate import kl_to
from lcqat_min.harness.models import BUNDLED, choose_device, load
from lcqat_min.harness.results import add_rows, rows_of
from lcqat_min.harness.text import load_text
from lcqat_min.layer.linear import quant_layers
from lcqat_min.packing.size import bits_per_weight
from lcqat_min.ptq.allocate import RATES, allocate, spent
from lcqat_min.ptq.lcqat import LCQAT
from lcqat_min.ptq.method import Method
from lcqat_min.ptq.model import quantize
from lcqat_min.ptq.select import linear_layers
from lcqat_min.ptq.trellis import Trellis
from lcqat_min.qat.loop import TrainConfig, train
from lcqat_min.systems.free_vq import FreeVQ

RESULTS = Path(__file__).resolve().parents[1] / "results"
EVAL_TOKENS = 8192
LONGER, MARKS = 5, 6  # times the tokens; scores on the way
BASE = next(recipe for recipe in RECIPES if recipe.name == "lcqat-planes")
QUANT_SWITCHES = {
    "rotate": ("none", "input"),
    "feedback": (False,),
    "refits": (0,),
    "estimator": ("clipped", "dge"),
    "learn_codebook": (False,),
    "start_on_codes": (True,),
    "dim": (2, 8),
}
RATE_SWITCHES = {"lr_latents": (0.0, 3e-3), "lr_scales": (0.0,), "lr_rest": (0.0, 2e-4, 1e-3)}
TRELLIS = next(recipe for recipe in RECIPES if recipe.name == "lcqat-trellis")
TRELLIS_SWITCHES = {  # of the method lcqat-trellis; the first that matter most, as a run may be stopped
    "reach": (1, 0, 4),
    "refits": (0, 2),
    "learn_codebook": (False,),
    "vectors of 2": ({"dim": 2, "reach": 1},),
}
OTHER_RATES = {  # bits per weight -> methods
    3.0: (Trellis(bits=3.0), LCQAT(bits=3.0, dim=2), LCQAT(bits=3.0, dim=1), FreeVQ(bits=3.0, dim=2)),
    1.0: (Trellis(bits=1.0), LCQAT(bits=1.0, dim=8), LCQAT(bits=1.0, dim=1), FreeVQ(bits=1.0, dim=8)),
    1.5: (Trellis(bits=1.5), LCQAT(bits=1.5, dim=4), FreeVQ(bits=1.5, dim=4)),
    4.0: (Trellis(bits=4.0), LCQAT(bits=4.0, dim=2), LCQAT(bits=4.0, dim=1), FreeVQ(bits=4.0, dim=2)),
    2.5: (Trellis(bits=2.5), LCQAT(bits=2.5, dim=2), FreeVQ(bits=2.5, dim=2)),
}
LONGER_RUNS = {  # name of the row -> (method, rates changed)
    "sq": ("sq", {}),
    "lcqat-paper": ("lcqat-paper", {}),
    "lcqat-planes": ("lcqat-planes", {}),
    "lcqat-planes, latents three times as fast": ("lcqat-planes", {"lr_latents": 3e-3}),
    "lcqat-planes, latents frozen": ("lcqat-planes", {"lr_latents": 0.0}),
    "lcqat-trellis": ("lcqat-trellis", {}),
}


def trials() -> list[tuple[str, object, Recipe, int]]:
    """(switch, value, recipe, seed): the unchanged recipe with three seeds, then each change with the first."""
    found = [("none", None, BASE, seed) for seed in (0, 1, 2)]
    for switch, values in QUANT_SWITCHES.items():
        found += [(switch, v, replace(BASE, quant=replace(BASE.quant, **{switch: v})), 0) for v in values]
    for switch, values in RATE_SWITCHES.items():
        found += [(switch, v, replace(BASE, rates={**BASE.rates, switch: v}), 0) for v in values]
    return [*found, ("teacher", False, replace(BASE, teacher=False), 0)]


def switches(experiment: Experiment) -> None:
    """Quantize, score, train, score, for each trial."""
    run_trials(experiment, RESULTS / "ablations.json", trials())


def run_trials(experiment: Experiment, path: Path, wanted: list[tuple[str, object, Recipe, int]]) -> None:
    """Each trial that `path` does not hold yet: a row of KL after rounding and after training, bits and seconds."""
    teacher, budget, config = experiment.teacher, experiment.budget, made_with(experiment)
    ids = experiment.text.validation[:EVAL_TOKENS]
    for switch, value, recipe, seed in tqdm(wanted, unit="trial"):
        if any((row["switch"], row["value"], row["seed"]) == (switch, value, seed) for row in rows_of(path, config)):
            continue
        clock, model = time.perf_counter(), quantized(experiment, recipe, seed)
        row = {"switch": switch, "value": value, "method": recipe.name, "seed": seed}
        row |= {"seconds_ptq": time.perf_counter() - clock, "bits_per_weight": bits_per_weight(model).per_weight}
        row["kl_ptq"] = kl_to(teacher, model, ids, budget.window)
        plan = TrainConfig(steps=budget.steps, **recipe.rates)
        last = train(model, experiment.batches(seed), plan, teacher if recipe.teacher else None)[-1]
        row["kl_qat"] = kl_to(teacher, model, ids, budget.window)
        row |= {"tokens": last["tokens"], "code_flips": last["flips"]}
        add_rows(path, [row], config)


def trellis_trials() -> list[tuple[str, object, Recipe, int]]:
    """(switch, value, recipe, seed): two trellises beside planes, changes, then other rates with its learning rates."""
    reach_2 = replace(TRELLIS, quant=replace(TRELLIS.quant, reach=2))
    found = [
        trial
        for seed in (0, 1, 2)
        for trial in (("none", None, TRELLIS, seed), ("planes", None, BASE, seed), ("reach", 2, reach_2, seed))
    ]
    for switch, values in TRELLIS_SWITCHES.items():
        changes = [(value, value if isinstance(value, dict) else {switch: value}) for value in values]
        found += [(switch, v, replace(TRELLIS, quant=replace(TRELLIS.quant, **change)), 0) for v, change in changes]
    for bits, methods in OTHER_RATES.items():
        found += [(f"{bits:g} bits", describe_method(m), replace(TRELLIS, quant=m), 0) for m in methods]
    return found


def describe_method(method: Method) -> str:
    """Its class and the size of its vectors."""
    return f"{type(method).__name__} of {method.dim or 'as few as whole'}"


def trellis(experiment: Experiment) -> None:
    """Quantize, score, train, score, for each trial of the trellis."""
    run_trials(experiment, RESULTS / "trellis.json", trellis_trials())


def bits(experiment: Experiment) -> None:
    """KL after rounding for one rate everywhere, and for rates by measured gains and by shares of the output lost."""
    teacher, budget, config = experiment.teacher, experiment.budget, made_with(experiment)
    path, ids, method = RESULTS / "bits.json", experiment.text.validation[:EVAL_TOKENS], LCQAT(dim=2)
    sizes = {name: layer.weight.numel() for name, layer in linear_layers(teacher, ("lm_head",))}
    for seed, average in itertools.product((0, 1, 2), (2.0, 2.5)):
        if any((row["bits"], row["seed"]) == (average, seed) for row in rows_of(path, config)):
            continue
        calibration, found = experiment.calibration(seed), {}
        reports = quantize(copy.deepcopy(teacher), calibration, method, seed=seed)
        spending = {
            "one rate": dict.fromkeys(sizes, average),
            "measured": allocate(teacher, calibration, average, seed=seed),
            "share of output lost": spent({r.name: r.loss for r in reports}, sizes, average, RATES[1:]),
        }
        for how, rates in spending.items():
            model = copy.deepcopy(teacher)
            quantize(model, calibration, method, changes={n: {"bits": rate} for n, rate in rates.items()}, seed=seed)
            found[how] = kl_to(teacher, model, ids, budget.window)
        rows = [{"bits": average, "seed": seed, "spent": how, "kl_ptq": kl} for how, kl in found.items()]
        add_rows(path, rows, config)


def longer(experiment: Experiment, seed: int = 0) -> None:
    """Train with LONGER times the tokens and score at MARKS places, and before."""
    teacher, budget, config = experiment.teacher, experiment.budget, made_with(experiment)
    path, ids, steps = RESULTS / "longer.json", experiment.text.validation[:EVAL_TOKENS], LONGER * budget.steps
    for name, (method, rates) in LONGER_RUNS.items():
        if any(row["method"] == name for row in rows_of(path, config)):
            continue
        recipe = next(recipe for recipe in RECIPES if recipe.name == method)
        model, found = quantized(experiment, recipe, seed), []
        begin = {n: layer.indices() for n, layer in quant_layers(model)}

        def score(step: int, *, model=model, found=found, begin=begin, name=name) -> None:
            if step % (steps // MARKS):
                return
            moved = torch.cat([(layer.indices() != begin[n]).flatten() for n, layer in quant_layers(model)])
            row = {"method": name, "seed": seed, "tokens": step * budget.window * budget.batch}
            row["kl"] = kl_to(teacher, model, ids, budget.window)
            found.append(row | {"code_flips": moved.double().mean().item()})

        score(0)
        plan = TrainConfig(steps=steps, **{**recipe.rates, **rates})
        train(model, experiment.batches(seed), plan, teacher, on_step=lambda step, loss, score=score: score(step + 1))
        add_rows(path, found, config)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("switches", "longer", "trellis", "bits"))
    args = options.parse_args()
    device = choose_device("cpu")
    teacher, tokenizer = load(BUNDLED, device)
    experiment = Experiment(teacher, tokenizer, load_text("docstrings", tokenizer), Budget(), device)
    {"switches": switches, "longer": longer, "trellis": trellis, "bits": bits}[args.what](experiment)


if __name__ == "__main__":
    main()
