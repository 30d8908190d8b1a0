"""What each part is worth: one switch at a time (results/ablations.json), and more tokens (results/longer.json).

    python scripts/ablate.py switches      `lcqat-planes` with one setting changed, same tokens; three seeds of itself
    python scripts/ablate.py longer        three arms with five times the tokens, scored on the way

Both are scored on validation text, so their figures are not those of the table, whose test text stays unseen. Finished
rows are written at once and found again by the next start; delete the file to begin anew. The seeds of the unchanged
arm tell how large a difference has to be to mean anything.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from lcqat_min.harness.compare import ARMS, Arm, Budget, Lab, made_with, start
from lcqat_min.harness.evaluate import kl_to
from lcqat_min.harness.models import BUNDLED, choose_device, load
from lcqat_min.harness.results import add_rows, rows_of
from lcqat_min.harness.text import load_text
from lcqat_min.layer.linear import quant_layers
from lcqat_min.qat.config import TrainConfig
from lcqat_min.qat.loop import train

RESULTS = Path(__file__).resolve().parents[1] / "results"
EVAL_TOKENS = 8192
LONGER, MARKS = 5, 6  # times the tokens; scores on the way
BASE = next(arm for arm in ARMS if arm.name == "lcqat-planes")
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
LONGER_ARMS = {  # name of the row -> (arm, rates changed)
    "sq": ("sq", {}),
    "lcqat-paper": ("lcqat-paper", {}),
    "lcqat-planes": ("lcqat-planes", {}),
    "lcqat-planes, latents three times as fast": ("lcqat-planes", {"lr_latents": 3e-3}),
    "lcqat-planes, latents frozen": ("lcqat-planes", {"lr_latents": 0.0}),
}


def trials() -> list[tuple[str, object, Arm, int]]:
    """(switch, value, arm, seed): the unchanged arm with three seeds, then each change with the first."""
    found = [("none", None, BASE, seed) for seed in (0, 1, 2)]
    for switch, values in QUANT_SWITCHES.items():
        found += [(switch, v, replace(BASE, quant=replace(BASE.quant, **{switch: v})), 0) for v in values]
    for switch, values in RATE_SWITCHES.items():
        found += [(switch, v, replace(BASE, rates={**BASE.rates, switch: v}), 0) for v in values]
    return [*found, ("teacher", False, replace(BASE, teacher=False), 0)]


def switches(lab: Lab) -> None:
    """Quantize, score, train, score, for each trial."""
    path, ids, config = RESULTS / "ablations.json", lab.text.validation[:EVAL_TOKENS], made_with(lab)
    for switch, value, arm, seed in tqdm(trials(), unit="trial"):
        if any((row["switch"], row["value"], row["seed"]) == (switch, value, seed) for row in rows_of(path, config)):
            continue
        model = start(lab, arm, seed)
        row = {"switch": switch, "value": value, "arm": arm.name, "seed": seed}
        row["kl_ptq"] = kl_to(lab.teacher, model, ids, lab.budget.window)
        teacher = lab.teacher if arm.teacher else None
        last = train(model, lab.batches(seed), TrainConfig(steps=lab.budget.steps, **arm.rates), teacher)[-1]
        row["kl_qat"] = kl_to(lab.teacher, model, ids, lab.budget.window)
        row |= {"tokens": last["tokens"], "code_flips": last["flips"]}
        add_rows(path, [row], config)


def longer(lab: Lab, seed: int = 0) -> None:
    """Train with LONGER times the tokens and score at MARKS places, and before."""
    path, ids, steps = RESULTS / "longer.json", lab.text.validation[:EVAL_TOKENS], LONGER * lab.budget.steps
    config = made_with(lab)
    for name, (arm_name, rates) in LONGER_ARMS.items():
        if any(row["arm"] == name for row in rows_of(path, config)):
            continue
        arm = next(arm for arm in ARMS if arm.name == arm_name)
        model, found = start(lab, arm, seed), []
        begin = {n: layer.indices() for n, layer in quant_layers(model)}

        def score(step: int, *, model=model, found=found, begin=begin, name=name) -> None:
            if step % (steps // MARKS):
                return
            codes = [(layer.indices() != begin[n]).flatten() for n, layer in quant_layers(model)]
            flips = sum(int(c.sum()) for c in codes) / sum(c.numel() for c in codes)
            kl = kl_to(lab.teacher, model, ids, lab.budget.window)
            tokens = step * lab.budget.window * lab.budget.batch
            found.append({"arm": name, "seed": seed, "tokens": tokens, "kl": kl, "code_flips": flips})

        score(0)
        plan = TrainConfig(steps=steps, **{**arm.rates, **rates})
        train(model, lab.batches(seed), plan, lab.teacher, on_step=lambda step, loss, score=score: score(step + 1))
        add_rows(path, found, config)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("switches", "longer"))
    args = options.parse_args()
    device = choose_device("cpu")
    teacher, tokenizer = load(BUNDLED, device)
    lab = Lab(teacher, tokenizer, load_text("docstrings", tokenizer), Budget(), device)
    {"switches": switches, "longer": longer}[args.what](lab)


if __name__ == "__main__":
    main()
