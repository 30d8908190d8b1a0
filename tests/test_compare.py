"""compare, report, cli, hub: the main job on a tiny model, its files, its errors. No network, no GPU.

pytest tests/test_compare.py
"""

import json
import re
from pathlib import Path

import pytest
import torch

from lcqat_min import cli, compare, report, results, runs
from lcqat_min.compare import ARMS, Arm, Budget, settings
from lcqat_min.hub import choose_device, load
from lcqat_min.results import Results, read_results, write_json

ROOT = Path(__file__).resolve().parents[1]
TINY = Budget(train_tokens=256, calibration_tokens=256, eval_tokens=128, window=32, batch=2)


@pytest.fixture
def run(place, tmp_path, monkeypatch):
    """Runs the CLI's compare with a tiny budget; results go under tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "Budget", lambda **changes: TINY)
    monkeypatch.setenv("LCQAT_CACHE", str(tmp_path / "cache"))

    def call(*args):
        paths = ["--model", str(place / "model"), "--text", str(place / "text.txt")]
        return cli.main(["compare", *paths, *map(str, args)])

    return call


def test_compare_writes_table_picture_and_samples(run, tmp_path, capsys):
    assert run("--arms", "rtn", "sq", "lcqat-planes") == 0
    (path,) = (tmp_path / "runs").iterdir()
    data = read_results(path / "compare.json")
    assert [row["arm"] for row in data["rows"]] == ["rtn", "sq", "lcqat-planes"]
    assert set(data["rows"][0]) == {
        "arm",
        "seed",
        "bits_per_weight",
        "ppl_fp",
        "ppl_ptq",
        "ppl_qat",
        "kl_ptq",
        "kl_qat",
        "code_flips",
        "tokens",
        "seconds_ptq",
        "seconds_qat",
        "peak_mb",
    }
    assert data["rows"][0]["kl_qat"] is None and data["rows"][1]["tokens"] == 256
    assert set(data["samples"]) == {"rtn", "sq", "lcqat-planes"}
    assert (path / "compare.svg").read_text().startswith("<?xml")
    assert not list(path.glob("*.part")) and not list(path.glob("*.safetensors"))
    out = capsys.readouterr().out
    assert "lcqat-planes" in out and "continued by each arm" in out


def test_the_control_alone_has_a_table_and_no_picture(run, tmp_path, capsys):
    assert run("--arms", "fp") == 0
    assert re.search(r"^.*\bfp\b.*0\.0000", capsys.readouterr().out, re.MULTILINE)
    assert not list(tmp_path.glob("runs/*/compare.svg"))


def test_interrupted_run_resumes_to_the_same_rows(run, tmp_path, monkeypatch, capsys):
    assert run("--arms", "rtn", "sq") == 0
    (whole,) = (tmp_path / "runs").iterdir()
    wanted = read_results(whole / "compare.json")["rows"]
    (whole / "compare.json").rename(tmp_path / "done.json")
    for path in whole.iterdir():
        path.unlink()
    whole.rmdir()

    real = compare.train

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "train", stopped)
    assert run("--arms", "rtn", "sq") == 130
    (half,) = (tmp_path / "runs").iterdir()
    assert [row["arm"] for row in read_results(half / "compare.json")["rows"]] == ["rtn"]
    monkeypatch.setattr(compare, "train", real)
    assert run("--arms", "rtn", "sq", "--resume", half) == 0
    rows = read_results(half / "compare.json")["rows"]
    for row, want in zip(rows, wanted, strict=True):
        assert {k: v for k, v in row.items() if "seconds" not in k and k != "peak_mb"} == {
            k: v for k, v in want.items() if "seconds" not in k and k != "peak_mb"
        }
    assert run("--arms", "rtn", "--resume", half) == 2  # other settings
    assert "other settings" in capsys.readouterr().err


def test_results_are_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "compare.json"
    write_json(path, {"rows": [1], "meta": {}})
    monkeypatch.setattr(results.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"rows": [2], "meta": {}})
    assert read_results(path)["rows"] == [1]


def test_rows_of_several_runs_keep_where_they_come_from(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    assert results.rows_of(path) == []
    for kl, commit in ((0.2, "first"), (0.1, "second")):
        monkeypatch.setattr(results, "_commit", lambda commit=commit: commit)
        results.add_row(path, {"kl": kl}, {"tokens": 8})
    data = results.read_results(path)
    assert [(row["kl"], row["commit"]) for row in data["rows"]] == [(0.2, "first"), (0.1, "second")]
    assert data["meta"]["config"] == {"tokens": 8} and all(row["date"] for row in data["rows"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": []}'])
def test_damaged_results_are_named(tmp_path, text):
    path = tmp_path / "compare.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="cannot read results from .*compare.json"):
        read_results(path)


@pytest.mark.parametrize(
    "args, message",
    [
        (("--arms", "sq", "nope"), "unknown arm nope; choose from fp"),
        (("--device", "cuda:99"), "CUDA device"),
        (("--device", "mps"), "not supported"),
        (("--device", "toaster"), "unknown device 'toaster'"),
        (("--resume", "nowhere"), "nothing to resume"),
        (("--text", "no-such-file.txt"), "no-such-file.txt"),
        (("--model", "nobody/no-such-model"), "cannot load 'nobody/no-such-model'"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(run, capsys, args, message):
    assert run(*args) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="lacks config.json and tokenizer_config.json"):
        load(tmp_path)


def test_empty_text_is_refused(run, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    assert run("--text", tmp_path / "empty.txt") == 2
    assert "empty.txt" in capsys.readouterr().err


def test_choose_device_accepts_the_cpu():
    assert choose_device("cpu") == torch.device("cpu")


def test_settings_change_with_every_field():
    base = settings([ARMS[0]], TINY, "m", "t", "p")
    others = [
        settings([ARMS[1]], TINY, "m", "t", "p"),
        settings([ARMS[0]], Budget(), "m", "t", "p"),
        settings([ARMS[0]], TINY, "n", "t", "p"),
        settings([ARMS[0]], TINY, "m", "u", "p"),
        settings([ARMS[0]], TINY, "m", "t", "q"),
    ]
    assert all(other != base for other in others)


def row(arm, seed, **values):
    blank = {
        "bits_per_weight": 2.1,
        "ppl_fp": 1.0,
        "ppl_ptq": 2.0,
        "ppl_qat": None,
        "kl_ptq": 0.2,
        "kl_qat": None,
        "code_flips": None,
        "tokens": 0,
        "seconds_ptq": 1.0,
        "seconds_qat": 1.0,
        "peak_mb": 1.0,
    }
    return {"arm": arm, "seed": seed, **blank, **values}


@pytest.fixture
def data():
    config = settings([Arm("a", "first", None), Arm("b", "second", None)], TINY, "m", "t", "p")
    return {
        "meta": results.describe(config),
        "curves": {},
        "samples": {},
        "rows": [row("a", 0), row("b", 0, kl_qat=0.1, tokens=5), row("b", 1, kl_qat=0.3, kl_ptq=0.4, tokens=5)],
    }


def test_table_shows_mean_and_range(data):
    line = report.table(data).splitlines()[3]
    assert "| `b` | second |" in line and "0.3000 (0.2000 to 0.4000)" in line and "0.2000 (0.1000 to 0.3000)" in line
    assert "| - |" in report.table(data).splitlines()[2]


def test_readme_block_is_replaced_whole(data, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    report.renew_readme(data, path)
    report.renew_readme(data, path)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and text.count("`b`") == 1
    path.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        report.renew_readme(data, path)


def test_picture_is_deterministic(data, tmp_path):
    for name in ("one.svg", "two.svg"):
        report.picture(data, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_readme_table_is_the_committed_one():
    data = read_results(ROOT / "results" / "compare.json")
    assert report.readme_block(data) in (ROOT / "README.md").read_text()


def test_committed_results_hold_every_arm_and_three_seeds():
    data = read_results(ROOT / "results" / "compare.json")
    assert {(row["arm"], row["seed"]) for row in data["rows"]} >= {
        (arm.name, seed) for arm in ARMS for seed in (0, 1, 2)
    }
    now = json.loads(json.dumps({arm.name: compare.asdict(arm) for arm in ARMS}))
    assert data["meta"]["config"]["arms"] == now, "the arms changed: run `make compare ARGS='--seeds 0 1 2 --save'`"


def test_bits_of_the_arms_are_close():
    data = read_results(ROOT / "results" / "compare.json")
    bits = [row["bits_per_weight"] for row in data["rows"] if row["arm"] != "fp"]
    assert 2 < min(bits) and max(bits) - min(bits) <= 0.05


def test_rates_of_the_arms_are_the_best_of_the_search():
    rows = read_results(ROOT / "results" / "rates.json")["rows"]
    for arm in ARMS:
        tried = [r for r in rows if r["arm"] == arm.name]
        if arm.quant is None or arm.rates is None:
            assert not tried
            continue
        best = min(tried, key=lambda r: (round(r["kl_qat"], 3), r.get("lr_latents", 0), r["lr_scales"]))
        assert len(tried) == 9 and arm.rates == {key: best[key] for key in best if key.startswith("lr_")}


def test_readme_states_only_generated_perplexities():
    """Prose outside the generated block carries no perplexity or KL of its own without naming the results file."""
    text = (ROOT / "README.md").read_text()
    prose = text.split(report.START)[0] + text.split(report.END)[1]
    assert not re.search(r"README_[A-Z]+", prose)


def test_results_refuses_other_settings(tmp_path):
    config = settings([ARMS[0]], TINY, "m", "t", "p")
    Results(tmp_path / "r.json", config).add(row("fp", 0), [], None)
    assert Results(tmp_path / "r.json", config).has("fp", 0)
    with pytest.raises(ValueError, match="model was m, is n"):
        Results(tmp_path / "r.json", settings([ARMS[0]], TINY, "n", "t", "p"))
