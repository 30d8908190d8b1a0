"""What the README says of the results is true of results/*.json: by more than the spread over seeds, or it fails.

pytest tests/project/test_claims.py
"""

import re
from pathlib import Path

import pytest

from lcqat_min.harness.report import by_arm
from lcqat_min.harness.results import read_results

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def arms():
    return by_arm(read_results(ROOT / "results" / "compare.json")["rows"])


def below(rows: list[dict], key: str, others: list[dict], other_key: str) -> bool:
    """The rule for a claim, notebook 00: the gap between the ranges over seeds is wider than the wider of them."""
    ours, theirs = [row[key] for row in rows], [row[other_key] for row in others]
    return min(theirs) - max(ours) > max(max(ours) - min(ours), max(theirs) - min(theirs))


def test_vector_rounding_beats_scalar_training(arms):
    assert below(arms["lcqat-planes"], "kl_ptq", arms["sq"], "kl_qat")


def test_published_scalar_start_does_not_reach_feedback_rounding(arms):
    assert below(arms["gptq"], "kl_ptq", arms["sq-paretoq"], "kl_qat")


@pytest.mark.parametrize("key", ["kl_ptq", "kl_qat"])
def test_order_of_the_arms(arms, key):
    assert below(arms["lcqat-planes"], key, arms["lcqat-paper"], key)
    assert below(arms["lcqat-paper"], key, arms["sq"], key)


def test_training_helps_every_trained_arm(arms):
    for name, rows in arms.items():
        if name != "fp" and rows[0]["kl_qat"] is not None:
            assert below(rows, "kl_qat", rows, "kl_ptq"), name


def level(rows: list[dict], others: list[dict], key: str) -> bool:
    """Ranges over seeds meet."""
    ours, theirs = [row[key] for row in rows], [row[key] for row in others]
    return min(ours) <= max(theirs) and min(theirs) <= max(ours)


def test_lattice_is_little_ahead_of_the_rotated_grid(arms):
    mean = {name: sum(row["kl_qat"] for row in arms[name]) / 3 for name in ("sq", "lcqat-release", "lcqat-paper")}
    assert abs(mean["lcqat-release"] - mean["lcqat-paper"]) < 0.1 * (mean["sq"] - mean["lcqat-paper"])


def test_untied_vectors_beat_every_scalar_arm(arms):
    assert all(below(arms["lcqat-planes"], "kl_ptq", arms[name], "kl_ptq") for name in ("rtn", "gptq", "lcqat-release"))
    for name in ("sq", "sq-paretoq", "lcqat-release", "lcqat-paper"):
        assert below(arms["lcqat-planes"], "kl_qat", arms[name], "kl_qat")


def test_planes_and_table_are_level_after_training(arms):
    assert level(arms["lcqat-planes"], arms["free-vq"], "kl_qat")


def test_codes_of_the_lcqat_arms_hardly_flip(arms):
    assert all(row["code_flips"] < 0.0001 for name in arms if name.startswith("lcqat") for row in arms[name])


def test_rates_that_flip_codes_did_not_help():
    rows = read_results(ROOT / "results" / "rates.json")["rows"]
    for arm in ("lcqat-paper", "lcqat-planes"):
        best = {
            rate: min(row["kl_qat"] for row in rows if row["arm"] == arm and row["lr_latents"] == rate)
            for rate in (0.001, 0.003, 0.01)
        }
        flips = {
            rate: max(row["code_flips"] for row in rows if row["arm"] == arm and row["lr_latents"] == rate)
            for rate in best
        }
        assert flips[0.001] < 0.0001 and 0.001 < flips[0.003] < flips[0.01]
        assert best[0.003] > best[0.001] - 0.0005 and best[0.01] > best[0.001] + 0.01


def test_control_drifts(arms):
    assert all(row["kl_qat"] > 0.01 and row["ppl_qat"] > row["ppl_fp"] for row in arms["fp"])


def test_more_tokens_leave_the_order():
    rows = read_results(ROOT / "results" / "longer.json")["rows"]
    by_arm = {name: [row for row in rows if row["arm"] == name] for name in {row["arm"] for row in rows}}
    assert all(found[-1]["kl"] < found[1]["kl"] for found in by_arm.values())
    last = {name: found[-1]["kl"] for name, found in by_arm.items()}
    assert last["lcqat-planes"] < last["lcqat-paper"] < last["sq"]
    first, end = by_arm["lcqat-planes"][1], by_arm["sq"][-1]
    assert first["tokens"] * 6 == end["tokens"] and first["kl"] < end["kl"]
    fast, frozen = (by_arm[f"lcqat-planes, latents {how}"][-1] for how in ("three times as fast", "frozen"))
    assert fast["code_flips"] > 0.01 and frozen["code_flips"] == 0
    table = [
        row["kl_qat"] for row in read_results(ROOT / "results" / "compare.json")["rows"] if row["arm"] == "lcqat-planes"
    ]
    seeds = max(table) - min(table)
    assert max(abs(one["kl"] - last["lcqat-planes"]) for one in (fast, frozen)) < seeds


def test_one_switch_at_a_time():
    rows = read_results(ROOT / "results" / "ablations.json")["rows"]
    base = [row["kl_qat"] for row in rows if row["switch"] == "none"]
    spread = max(base) - min(base)
    loss = {(row["switch"], row["value"]): row["kl_qat"] - base[0] for row in rows if row["switch"] != "none"}
    small = [
        ("estimator", "dge"),
        ("estimator", "clipped"),
        ("learn_codebook", False),
        ("refits", 0),
        ("lr_latents", 0.0),
        ("lr_latents", 0.003),
    ]
    assert max(loss[key] for key in small) < 1.5 * spread
    assert min(loss["feedback", False], loss["rotate", "none"]) > 5 * spread
    assert loss["dim", 8] < -2 * spread
    assert loss["lr_scales", 0.0] > 2 * spread and loss["lr_rest", 0.0] > loss["lr_scales", 0.0] + 2 * spread


def test_packed_products_on_a_cpu():
    stored = read_results(ROOT / "results" / "packed_cpu.json")
    ratio = {(row["out"], row["codebook"], row["way"], row["batch"]): row["ratio"] for row in stored["rows"]}
    assert {out for out, *_ in ratio} == {2048, 11008} and stored["generation"] > 1
    for (_, name, way, batch), value in ratio.items():
        if batch == 1:
            assert value > 1 if way == "eager" else value < 1
        if batch == 256 and name != "planes d=8":
            assert 0.8 < value < 1.2


def test_answers_in_the_library_example(arms):
    """The example uses seed 0 of lcqat-planes: its printed answers are that row's."""
    text = (ROOT / "README.md").read_text()
    printed = re.findall(r"text\.test\[:16384\]\):\.4f}\"\)  # (\S+)", text)
    row = next(row for row in arms["lcqat-planes"] if row["seed"] == 0)
    assert printed == [f"{row['kl_ptq']:.4f}", f"{row['kl_qat']:.4f}"]
