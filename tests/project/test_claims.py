"""What the README says of the results is true of results/*.json: by more than the spread over seeds, or it fails.

Every number in its prose is listed in PHRASES, with the test of it.

pytest tests/project/test_claims.py
"""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

from lcqat_min.codebook import frame_planes
from lcqat_min.harness.compare import RECIPES, Budget
from lcqat_min.harness.models import BUNDLED, load
from lcqat_min.harness.report import END, START, by_method
from lcqat_min.harness.results import read_results
from lcqat_min.ptq.select import linear_layers
from lcqat_min.ptq.trellis import Trellis

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = (
    r"\d[\d.,]*|two|three|four|five|fifth|fiftieth|sixth|eight|nine|ten|tenth|fourteen|twentieth|hundredth|hundred|thousand|half"
    r"|halves|twice"
)
PHRASES = {  # every number in the README's prose and the word after it -> the test that holds it, or why there is none
    "Two bits": "the task", "2 bits": "the task", "Two commands": "a heading",
    "3.11 to": "test_the_readme_names_versions", "3.14 and": "test_the_readme_names_versions",
    "3.14 not": "test_the_readme_names_versions", "3.14.1 On": "a fault of that version",
    "Fourteen notebooks": "test_counts", "eight such": "test_counts",
    "90 minutes": "test_guide.py", "half a": "test_guide.py", "two days": "test_guide.py",
    "halves their": "bf16 for fp32",
    "tenth before": "test_the_trellis_is_closest",
    "twentieth other": "test_a_trellis_of_less_reach_is_still_closer_than_planes",
    "8 numbers": "test_counts", "36 and": "test_counts",
    "tenth of": "test_lattice_is_little_ahead_of_the_rotated_grid", "twentieth Untied": "test_planes_and_table",
    "ten thousand": "test_vectors_hardly_need_changed_codes", "hundredth The": "test_vectors_hardly_need_changed_codes",
    "three times": "test_more_tokens_leave_the_order", "half longer": "test_packed_products_on_a_cpu",
    "three seeds": "test_bits_where_they_count", "fifth Rates": "test_bits_where_they_count",
    "five times": "test_more_tokens_leave_the_order", "sixth of": "test_more_tokens_leave_the_order",
    "fiftieth So": "test_more_tokens_leave_the_order",
    "eight weights": "test_one_switch_at_a_time", "four bring": "test_one_switch_at_a_time", "256 times": "test_counts",
    "4.5 million": "test_counts",
}  # fmt: skip


def prose() -> str:
    """The README without code, generated table, other tables, targets of links, and numbers of papers and notebooks."""
    text = README.split(START)[0] + README.split(END)[1]
    for left_out in (r"```.*?```", r"^\|.*$", r"`[^`]*`", r"\]\([^)]*\)", r"\b\d{4}\.\d{5}\b", r"\[notebook \d\d"):
        text = re.sub(left_out, "", text, flags=re.DOTALL if "```" in left_out else re.MULTILINE)
    return text


def test_every_number_in_the_prose_has_its_test():
    """A new sentence with a number needs a test here, and a line in PHRASES."""
    found = re.findall(rf"\b({NUMBER})\b(?:\W+(\w+))?", prose(), re.IGNORECASE)
    assert {f"{number} {word}".strip() for number, word in found} == PHRASES.keys()
    named = re.findall(r"test_\w+", " ".join(PHRASES.values()))
    assert all(name in globals() or (ROOT / "tests" / "project" / f"{name}.py").exists() for name in named)


@pytest.fixture(scope="module")
def methods():
    return by_method(read_results(ROOT / "results" / "compare.json")["rows"])


def below(rows: list[dict], key: str, others: list[dict], other_key: str) -> bool:
    """The rule for a claim, notebook 00: the gap between the ranges over seeds is wider than the wider of them."""
    ours, theirs = [row[key] for row in rows], [row[other_key] for row in others]
    return min(theirs) - max(ours) > max(max(ours) - min(ours), max(theirs) - min(theirs))


def test_the_trellis_is_closest(methods):
    for key in ("kl_ptq", "kl_qat"):
        for name in ("lcqat-planes", "lcqat-planes8", "free-vq"):
            assert below(methods["lcqat-trellis"], key, methods[name], key)
        ours, theirs = (sum(row[key] for row in methods[f"lcqat-{kind}"]) for kind in ("trellis", "planes"))
        assert ours < 0.9 * theirs
    seconds = {name: min(row["seconds_ptq"] for row in methods[name]) for name in ("lcqat-trellis", "lcqat-planes")}
    assert seconds["lcqat-trellis"] > 2 * seconds["lcqat-planes"]


def test_a_trellis_of_less_reach_is_still_closer_than_planes():
    rows = read_results(ROOT / "results" / "trellis.json")["rows"]
    planes = [row for row in rows if row["switch"] == "planes"]
    reach_2 = [row for row in rows if (row["switch"], row["value"]) == ("reach", 2)]
    assert len(planes) == len(reach_2) == 3 and 4**2 == 4**3 / 4
    for key in ("kl_ptq", "kl_qat"):
        assert below(reach_2, key, planes, key)
        assert sum(row[key] for row in reach_2) < 0.95 * sum(row[key] for row in planes)


def test_rounding_to_a_trellis_beats_scalar_training(methods):
    assert below(methods["lcqat-trellis"], "kl_ptq", methods["sq"], "kl_qat")


def test_published_scalar_start_does_not_reach_feedback_rounding(methods):
    assert below(methods["gptq"], "kl_ptq", methods["sq-paretoq"], "kl_qat")


@pytest.mark.parametrize("key", ["kl_ptq", "kl_qat"])
def test_order_of_the_methods(methods, key):
    assert below(methods["lcqat-planes"], key, methods["lcqat-paper"], key)
    assert below(methods["lcqat-paper"], key, methods["sq"], key)


def test_training_helps_every_trained_method(methods):
    for name, rows in methods.items():
        if name != "fp" and rows[0]["kl_qat"] is not None:
            assert below(rows, "kl_qat", rows, "kl_ptq"), name


def test_lattice_is_little_ahead_of_the_rotated_grid(methods):
    mean = {name: sum(row["kl_qat"] for row in methods[name]) / 3 for name in ("sq", "lcqat-release", "lcqat-paper")}
    assert abs(mean["lcqat-release"] - mean["lcqat-paper"]) < 0.1 * (mean["sq"] - mean["lcqat-paper"])


def test_untied_vectors_are_better_than_every_scalar_method(methods):
    assert all(
        below(methods["lcqat-planes"], "kl_ptq", methods[name], "kl_ptq") for name in ("rtn", "gptq", "lcqat-release")
    )
    for name in ("sq", "sq-paretoq", "lcqat-release", "lcqat-paper"):
        assert below(methods["lcqat-planes"], "kl_qat", methods[name], "kl_qat")


def test_planes_and_table(methods):
    planes, table = (sum(row["kl_qat"] for row in methods[name]) for name in ("lcqat-planes", "free-vq"))
    assert abs(planes - table) < planes / 20


def test_vectors_hardly_need_changed_codes():
    rows = read_results(ROOT / "results" / "rates.json")["rows"]
    gains = {}
    for method in ("sq", "lcqat-paper", "lcqat-planes", "lcqat-trellis"):
        found = [row for row in rows if row["method"] == method]
        slow = [row for row in found if row["lr_latents"] == min(row["lr_latents"] for row in found)]
        best = min(row["kl_qat"] for row in found)
        gains[method] = min(row["kl_qat"] for row in slow) / best - 1
        assert method == "sq" or max(row["code_flips"] for row in slow) < 0.0001
    assert max(gain for method, gain in gains.items() if method != "sq") < 0.01 < 0.03 < gains["sq"]


def test_control_drifts(methods):
    assert all(row["kl_qat"] > 0.01 and row["ppl_qat"] > row["ppl_fp"] for row in methods["fp"])


def test_more_tokens_leave_the_order():
    rows = read_results(ROOT / "results" / "longer.json")["rows"]
    by_method = {name: [row for row in rows if row["method"] == name] for name in {row["method"] for row in rows}}
    assert all(found[-1]["kl"] < found[1]["kl"] for found in by_method.values())
    last = {name: found[-1]["kl"] for name, found in by_method.items()}
    assert last["lcqat-planes"] < last["lcqat-paper"] < last["sq"]
    first, end = by_method["lcqat-planes"][1], by_method["sq"][-1]
    assert first["tokens"] * 6 == end["tokens"] == 6 * 5 * Budget().train_tokens // 6 and first["kl"] < end["kl"]
    fast, frozen = (by_method[f"lcqat-planes, latents {how}"][-1] for how in ("three times as fast", "frozen"))
    assert fast["code_flips"] > 0.01 and frozen["code_flips"] == 0
    assert max(abs(one["kl"] - last["lcqat-planes"]) for one in (fast, frozen)) < last["lcqat-planes"] / 50


def test_bits_where_they_count():
    rows = read_results(ROOT / "results" / "bits.json")["rows"]
    for average in (2.0, 2.5):
        kl = {
            how: [r["kl_ptq"] for r in rows if (r["bits"], r["spent"]) == (average, how)]
            for how in ("one rate", "measured", "share of output lost")
        }
        assert {len(found) for found in kl.values()} == {3}
        one, measured, lost = kl.values()
        assert max(measured) < 4 / 5 * min(one)
        assert all(a > b for a, b in zip(lost, one, strict=True))


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
    assert abs(loss["start_on_codes", True]) < spread  # as `train` on the command line starts
    assert loss["lr_scales", 0.0] > 2 * spread and loss["lr_rest", 0.0] > loss["lr_scales", 0.0] + 2 * spread


def test_packed_products_on_a_cpu():
    stored = read_results(ROOT / "results" / "packed_cpu.json")
    ratio = {(row["out"], row["codebook"], row["way"], row["batch"]): row["ratio"] for row in stored["rows"]}
    assert {out for out, *_ in ratio} == {2048, 11008} and stored["generation"] > 1
    for (_, name, way, batch), value in ratio.items():
        if batch == 1:
            assert value > 1 if way == "eager" else value < 1
        if batch == 256:
            assert 0.8 < value < (1.5 if name in ("planes d=4", "table d=4") else 2.0)


def test_kernels_were_compiled_without_spills():
    rows = read_results(ROOT / "results" / "kernels_aot.json")["rows"]
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "gfx942"} and not any(row["spills"] for row in rows)


def test_compare_takes_at_most_about_ten_minutes(methods):
    usual = [recipe.name for recipe in RECIPES if recipe.by_default]
    seconds = sum(row["seconds_ptq"] + row["seconds_qat"] for name in usual for row in methods[name]) / 3
    assert 6 * 60 < seconds < 10 * 60 and "about ten minutes on 2 cores" in README


def test_counts():
    assert len(list((ROOT / "notebooks").glob("*.ipynb"))) == 14
    spec = importlib.util.spec_from_file_location("conditions", ROOT / "scripts" / "anywhere.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["conditions"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    assert len(module.CONDITIONS) == 8
    book = frame_planes()
    assert book.A.numel() + book.b.numel() == 36 and 2 ** (2 * 8) == 256 * 2 ** (2 * 4)
    model, _ = load(BUNDLED)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 4.5
    assert Trellis().start_taps().numbers() == 8
    assert len(list(linear_layers(model))) == 28 and "# 28 linear layers" in README


def test_the_readme_names_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11"
    (torch_pin,) = re.findall(r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"pip install {torch_pin}\n" in README


def test_answers_in_the_library_example(methods):
    """The example uses seed 0 of lcqat-trellis: its printed answers are that row's."""
    printed = re.findall(r"text\.test\[:16384\]\):\.4f}\"\)  # (\S+)", README)
    row = next(row for row in methods["lcqat-trellis"] if row["seed"] == 0)
    assert printed == [f"{row['kl_ptq']:.4f}", f"{row['kl_qat']:.4f}"]
    budget = Budget()
    assert (budget.calibration_tokens, budget.window, budget.batch, budget.steps) == (128 * 256, 256, 4, 60)
    assert budget.eval_tokens == 16384 and "text.train, 128, 256," in README and "TrainConfig(steps=60)" in README
