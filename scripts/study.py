"""Three studies behind the table of `compare`: learning rates, tokens, and one switch at a time.

    python scripts/study.py rates      six settings of the learning rates for each trained arm, on validation text
    python scripts/study.py tokens     final KL of the scalar and the vector arms for 1/16 ... 1/1 of the tokens
    python scripts/study.py switches   lcqat-planes with one choice changed at a time

Each writes results/<study>.json after every run and goes on where it stopped; delete the file to start again. Several
processes may share a study by --arms. Rates are
chosen in RATE_STEPS steps and on validation text, so that the table's test text stays unseen.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from lcqat_min.compare import ARMS, Arm, Budget, Lab, describe, read_results, start, write_json
from lcqat_min.evaluate import kl_to
from lcqat_min.hub import BUNDLED, choose_device, load
from lcqat_min.text import load_text
from lcqat_min.train import TrainConfig, train

ROOT = Path(__file__).resolve().parents[1]
LATENTS, SIDE = (0.0003, 0.001, 0.003), (3e-3, 1e-2)  # 3 x 2 settings
LATENTS_ON_CODES = (0.003, 0.01, 0.03)  # latents that start on the codes are half a bin from any boundary
SIDE_ALONE = (1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2)  # as many for arms without latents
SHARES = (16, 8, 4, 2, 1)
RATE_STEPS = 40
EVAL_TOKENS = 8192
TRAINED = {arm.name: arm for arm in ARMS if arm.quant is not None and arm.rates is not None}


def rate_settings(arm: Arm) -> list[dict[str, float]]:
    """The six settings that the search tries for an arm."""
    if arm.quant.codebook == "table":
        return [{"lr_scales": side, "lr_codebooks": side} for side in SIDE_ALONE]
    grid = LATENTS_ON_CODES if arm.quant.start_on_codes else LATENTS
    return [
        {"lr_latents": latents, "lr_scales": side, "lr_codebooks": side}
        for latents, side in itertools.product(grid, SIDE)
    ]


def switches() -> dict[str, Arm]:
    """Variants of lcqat-planes, each with one choice changed."""
    planes = TRAINED["lcqat-planes"]
    changes = {
        "as compared": {},
        "no rotation": {"rotate": "none"},
        "inputs rotated": {"rotate": "input"},
        "no feedback": {"feedback": False},
        "DGE gradient": {"estimator": "dge"},
        "A and b frozen": {"learn_codebook": False},
        "(A, b) not refitted": {"refits": 0},
    }
    variants = {what: replace(planes, quant=replace(planes.quant, **change)) for what, change in changes.items()}
    faster = {
        f"latents {rate} bins a step": replace(planes, rates=planes.rates | {"lr_latents": rate})
        for rate in (0.0, 0.003, 0.01)
    }
    return variants | faster


def runs(study: str, seeds: list[int]) -> list[tuple[dict, Arm, dict, int]]:
    """(key of the row, arm, rates, steps) of every run of a study."""
    full = Budget().steps
    if study == "rates":
        return [
            ({"arm": arm.name, **rates, "seed": seeds[0]}, arm, rates, RATE_STEPS)
            for arm in TRAINED.values()
            for rates in rate_settings(arm)
        ]
    if study == "tokens":
        return [
            ({"arm": name, "share": share, "seed": seed}, TRAINED[name], TRAINED[name].rates, max(1, full // share))
            for seed in seeds
            for name in ("sq", "lcqat-paper", "lcqat-planes")
            for share in SHARES
        ]
    return [
        ({"variant": what, "seed": seed}, arm, arm.rates, full) for seed in seeds for what, arm in switches().items()
    ]


def rows_of(path: Path) -> list[dict]:
    """Rows that are there already; read anew each time, since another process may have added some."""
    return read_results(path)["rows"] if path.exists() else []


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("study", choices=("rates", "tokens", "switches"))
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--arms", nargs="+", default=list(TRAINED), help="only runs of these arms")
    options.add_argument("--device", default="cpu")
    args = options.parse_args()
    device, budget = choose_device(args.device), Budget()
    teacher, tokenizer = load(BUNDLED, device)
    lab = Lab(teacher, tokenizer, load_text("docstrings", tokenizer), budget, device)
    ids = (lab.text.validation if args.study == "rates" else lab.text.test)[:EVAL_TOKENS]
    path = ROOT / "results" / f"{args.study}.json"
    todo = [run for run in runs(args.study, args.seeds) if run[1].name in args.arms]
    begun: tuple | None = None  # runs that share an arm and a seed share its start
    for key, arm, rates, steps in tqdm(todo, unit="run"):
        if any(all(row.get(k) == v for k, v in key.items()) for row in rows_of(path)):
            continue
        clock = time.perf_counter()
        if begun is None or begun[0] != (arm.quant, key["seed"]):
            model = start(lab, arm, key["seed"])
            begun = (arm.quant, key["seed"]), model, kl_to(teacher, model, ids, budget.window)
        model = copy.deepcopy(begun[1])
        history = train(model, lab.batches(key["seed"]), TrainConfig(steps=steps, **rates), teacher)
        kl_ptq, kl = begun[2], kl_to(teacher, model, ids, budget.window)
        row = {
            **key,
            "tokens": history[-1]["tokens"],
            "kl_ptq": kl_ptq,
            "kl_qat": kl,
            "code_flips": history[-1]["flips"],
            "seconds": time.perf_counter() - clock,
        }
        write_json(path, {"meta": describe({"budget": asdict(budget)}), "rows": [*rows_of(path), row]})
        tqdm.write(f"{key}  KL {kl_ptq:.4f} -> {kl:.4f}  flips {history[-1]['flips']:.2%}")


if __name__ == "__main__":
    main()
