"""The comparison on a tiny model: rows, files, table, picture, errors. No network, no GPU.

pytest tests/harness/test_compare.py
"""

import copy
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcqat_min.cli import compare as runs
from lcqat_min.cli import main as cli
from lcqat_min.disk import whole_file
from lcqat_min.disk.whole_file import alone
from lcqat_min.errors import UsageError
from lcqat_min.harness import compare, report, results
from lcqat_min.harness.compare import RECIPES, Budget, Recipe, fitting, settings
from lcqat_min.harness.models import BUNDLED, choose_device, label, load
from lcqat_min.harness.results import Results, read_results, write_json
from lcqat_min.harness.text import Splits, load_text
from lcqat_min.packing.convert import to_storage_precision

ROOT = Path(__file__).resolve().parents[2]
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
    assert run("--methods", "rtn", "sq", "lcqat-planes") == 0
    (path,) = (tmp_path / "runs").iterdir()
    data = read_results(path / "compare.json")
    assert [row["method"] for row in data["rows"]] == ["rtn", "sq", "lcqat-planes"]
    assert set(data["rows"][0]) == {
        "method",
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
    assert "lcqat-planes" in out and "continued by each method" in out


def test_the_control_alone_has_a_table_and_no_picture(run, tmp_path, capsys):
    assert run("--methods", "fp") == 0
    assert re.search(r"^.*\bfp\b.*0\.0000", capsys.readouterr().out, re.MULTILINE)
    assert not list(tmp_path.glob("runs/*/compare.svg"))


def test_interrupted_run_resumes_to_the_same_rows(run, tmp_path, monkeypatch, capsys):
    assert run("--methods", "rtn", "sq") == 0
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
    assert run("--methods", "rtn", "sq") == 130
    (half,) = (tmp_path / "runs").iterdir()
    assert [row["method"] for row in read_results(half / "compare.json")["rows"]] == ["rtn"]
    monkeypatch.setattr(compare, "train", real)
    assert run("--methods", "rtn", "sq", "--out", half) == 0
    rows = read_results(half / "compare.json")["rows"]
    for row, want in zip(rows, wanted, strict=True):
        assert {k: v for k, v in row.items() if "seconds" not in k and k != "peak_mb"} == {
            k: v for k, v in want.items() if "seconds" not in k and k != "peak_mb"
        }
    assert run("--methods", "rtn", "--out", half) == 2  # other settings
    assert "other settings" in capsys.readouterr().err


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.time, "strftime", lambda form: "now")
    assert [runs.run_folder(None).name for _ in range(3)] == ["now", "now-2", "now-3"]
    assert runs.run_folder(tmp_path / "mine").is_dir()
    with pytest.raises(UsageError, match="mine exists already and holds no run of compare"):
        runs.run_folder(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(UsageError, match="choose another --out"):
            runs.run_folder(tmp_path / place)


def test_a_run_belongs_to_one_process(run, tmp_path, capsys):
    assert run("--methods", "rtn", "--out", tmp_path / "mine") == 0
    before = (tmp_path / "mine" / "compare.json").read_bytes()
    with alone(tmp_path / "mine" / "run"):
        assert run("--methods", "rtn", "--seeds", 0, 1, "--out", tmp_path / "mine") == 2
    assert "another process is at work" in capsys.readouterr().err
    assert (tmp_path / "mine" / "compare.json").read_bytes() == before
    assert run("--methods", "rtn", "--seeds", 0, 1, "--out", tmp_path / "mine") == 0
    assert [row["seed"] for row in read_results(tmp_path / "mine" / "compare.json")["rows"]] == [0, 1]


def test_a_start_that_fails_leaves_no_folder(run, tmp_path):
    assert run("--text", "no-such-file.txt") == 2 == run("--prompt", "", "--out", tmp_path / "mine")
    assert not list((tmp_path / "runs").iterdir()) and not (tmp_path / "mine").exists()


def test_rows_are_stored_before_what_may_fail(run, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("out of order")

    monkeypatch.setattr(runs, "continue_text", broken)
    monkeypatch.setattr(report, "picture", broken)
    monkeypatch.setattr(runs, "DATA", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "compare.json").write_text("{")
    assert run("--methods", "rtn", "gptq", "--out", tmp_path / "mine") == 0
    data, found = read_results(tmp_path / "mine" / "compare.json"), capsys.readouterr()
    assert [row["method"] for row in data["rows"]] == ["rtn", "gptq"] and data["samples"] == {}
    assert re.search(r"^gptq +\d", found.out, re.MULTILINE)  # the table is there
    for note in (
        "rtn has no sample text; its row is stored (RuntimeError: out of order)",
        "there is no picture",
        "the committed figures are not shown",
    ):
        assert f"note: {note}" in found.err


def test_without_matplotlib_the_table_is_there_and_save_is_refused_first(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(runs.sys.modules, "matplotlib.figure", None)
    assert run("--methods", "rtn", "--out", tmp_path / "mine") == 0
    found = capsys.readouterr()
    assert "rtn" in found.out and "note: there is no picture; pip install matplotlib" in found.err
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
    assert run("--save", "--out", tmp_path / "other") == 2
    assert "cannot import matplotlib: install it first" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_save_is_for_whole_comparisons_in_a_clone(run, tmp_path, monkeypatch, capsys):
    assert run("--save", "--methods", "rtn") == 2
    assert "leave out --methods --model --text, or --save" in capsys.readouterr().err
    monkeypatch.setattr(runs, "DATA", tmp_path)
    assert run("--save") == 2
    assert "this package is not in one: leave --save out, or run in a clone" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))


def test_another_text_does_not_go_on_with_a_run(run, place, tmp_path, capsys):
    shutil.copy(place / "text.txt", tmp_path / "text.txt")
    args = ("--text", tmp_path / "text.txt", "--methods", "rtn")
    assert run(*args, "--out", tmp_path / "mine") == 0
    digest = read_results(tmp_path / "mine" / "compare.json")["meta"]["config"]["text_digest"]
    assert re.fullmatch("[0-9a-f]{16}", digest)
    with open(tmp_path / "text.txt", "a") as file:
        file.write("\n\nreturn the array of another length " * 20)
    assert run(*args, "--out", tmp_path / "mine") == 2
    assert f"text_digest was {digest}, is" in capsys.readouterr().err


def test_seeds_and_methods_that_are_given_twice_run_once(run, tmp_path):
    assert run("--methods", "rtn", "rtn", "--seeds", 1, 0, 1, "--out", tmp_path / "mine") == 0
    data = read_results(tmp_path / "mine" / "compare.json")
    assert [(row["method"], row["seed"]) for row in data["rows"]] == [("rtn", 1), ("rtn", 0)]


def test_budget_follows_model_and_text(tiny_llama, tiny_gpt2):
    text = Splits(torch.arange(5000) % 97, torch.arange(300), torch.arange(400), "a text")
    model = tiny_gpt2()
    assert fitting(Budget(), model, text) == Budget(calibration_tokens=5000, eval_tokens=400)
    assert fitting(TINY, model, text) == TINY
    model.config.n_positions = 128
    assert fitting(Budget(), model, text).window == 128
    with pytest.raises(ValueError, match="'a text' has 5000 training tokens, and one step takes 8192"):
        fitting(replace(Budget(), batch=64), model, text)


def test_results_are_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "compare.json"
    write_json(path, {"rows": [1], "meta": {}})
    monkeypatch.setattr(whole_file.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"rows": [2], "meta": {}})
    assert read_results(path)["rows"] == [1] and list(tmp_path.iterdir()) == [path]


def test_rows_of_several_runs_keep_where_they_come_from(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    assert results.rows_of(path, {"tokens": 8}) == []
    for kl, commit in ((0.2, "first"), (0.1, "second")):
        monkeypatch.setattr(results, "_commit", lambda commit=commit: commit)
        results.add_rows(path, [{"kl": kl}], {"tokens": 8})
    data = results.read_results(path)
    assert [(row["kl"], row["commit"]) for row in data["rows"]] == [(0.2, "first"), (0.1, "second")]
    assert data["meta"]["config"] == {"tokens": 8} and all(row["date"] for row in data["rows"])


def test_rows_that_are_written_at_one_time_are_all_kept(tmp_path, monkeypatch):
    read, config = results.read_results, {"tokens": 8}
    monkeypatch.setattr(results, "read_results", lambda path: (read(path), time.sleep(0.01))[0])  # others get between
    monkeypatch.setattr(results, "describe", lambda config: {"config": config, "commit": "c", "date": "d"})
    write_json(tmp_path / "rows.json", {"meta": {"config": config}, "rows": []})
    started = [Results(tmp_path / "run.json", config) for _ in range(3)]  # each has an empty file in memory
    with ThreadPoolExecutor(6) as pool:
        done = [pool.submit(results.add_rows, tmp_path / "rows.json", [{"n": n}], config) for n in range(6)]
        done += [pool.submit(one.add, row("a", n), []) for n, one in enumerate(started)]
    assert all(future.exception() is None for future in done)
    assert sorted(found["n"] for found in read(tmp_path / "rows.json")["rows"]) == list(range(6))
    assert sorted(found["seed"] for found in read(tmp_path / "run.json")["rows"]) == [0, 1, 2]
    assert not list(tmp_path.glob("*.lock"))


def test_a_lock_ends_with_its_process(tmp_path):
    code = [(ROOT / "lcqat_min" / name).read_text() for name in ("disk/whole_file.py", "errors.py")]  # without torch
    source = code[0].replace("from ..errors import UsageError\n", code[1])
    killed = f"{source}\nwith alone(Path({str(tmp_path / 'run')!r})):\n    os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", killed]).returncode != 0
    assert (tmp_path / "run.lock").exists()
    with alone(tmp_path / "run"), pytest.raises(ValueError, match="another process is at work"):
        with alone(tmp_path / "run"):
            pytest.fail("two at a time")


def test_rows_of_other_settings_are_not_mixed(tmp_path):
    path = tmp_path / "rows.json"
    results.add_rows(path, [{"kl": 1}, {"kl": 2}], {"text_digest": "old"})
    for call in (results.rows_of, lambda path, config: results.add_rows(path, [{"kl": 3}], config)):
        with pytest.raises(ValueError, match="text_digest was old, is new"):
            call(path, {"text_digest": "new"})
    assert [found["kl"] for found in results.rows_of(path, {"text_digest": "old"})] == [1, 2]


@pytest.mark.parametrize("script", ["ablate", "search_rates"])
def test_other_measurements_say_their_text_and_go_on_with_no_other(script, tiny_llama, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    ids = torch.arange(640) % 97
    experiment = compare.Experiment(tiny_llama(), None, Splits(ids, ids, ids, "t"), TINY, torch.device("cpu"))
    other = replace(experiment, text=Splits(ids, ids, ids.flip(0), "t"))
    if script == "ablate":
        path = tmp_path / "ablations.json"
        monkeypatch.setattr(made, "RESULTS", tmp_path)
        monkeypatch.setattr(made, "trials", lambda: [("none", None, RECIPES[4], 0)])
        measure = made.switches
    else:
        path = tmp_path / "rates.json"
        monkeypatch.setattr(made, "RESULTS", path)
        monkeypatch.setattr(made, "STEPS", 1)
        monkeypatch.setattr(made, "settings", lambda recipe: [RECIPES[4].rates])
        measure = lambda experiment: made.search(experiment, RECIPES[4])  # noqa: E731
    for _ in range(2):  # the second finds the row of the first
        measure(experiment)
        data = read_results(path)
        assert len(data["rows"]) == 1 and data["meta"]["config"]["text_digest"] == experiment.text.digest
    with pytest.raises(ValueError, match=f"text_digest was {experiment.text.digest}, is {other.text.digest}"):
        measure(other)


def test_results_name_no_commit_of_a_clone_around_an_installed_package(tmp_path, monkeypatch):
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "site" / "lcqat_min").mkdir(parents=True)
    monkeypatch.setattr(results, "__file__", str(tmp_path / "site" / "lcqat_min" / "harness/results.py"))
    assert results._commit() is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": []}'])
def test_damaged_results_are_named(tmp_path, text):
    path = tmp_path / "compare.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="cannot read results from .*compare.json"):
        read_results(path)


@pytest.mark.parametrize(
    "args, message",
    [
        (("--methods", "sq", "nope"), "unknown method nope; choose from fp"),
        (("--device", "cuda:99"), "CUDA device"),
        (("--device", "mps"), "not supported"),
        (("--device", "toaster"), "unknown device 'toaster'"),
        (("--text", "no-such-file.txt"), "no-such-file.txt"),
        (("--model", "nobody/no-such-model"), "cannot load 'nobody/no-such-model'"),
        (("--prompt", ""), "the prompt is empty"),
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
    base = settings([RECIPES[0]], TINY, "m", "t", "p", "d")
    others = [
        settings([RECIPES[1]], TINY, "m", "t", "p", "d"),
        settings([RECIPES[0]], Budget(), "m", "t", "p", "d"),
        settings([RECIPES[0]], TINY, "n", "t", "p", "d"),
        settings([RECIPES[0]], TINY, "m", "u", "p", "d"),
        settings([RECIPES[0]], TINY, "m", "t", "q", "d"),
    ]
    assert all(other != base for other in others)


def row(method, seed, **values):
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
    return {"method": method, "seed": seed, **blank, **values}


@pytest.fixture
def data():
    config = settings([Recipe("a", "first", None), Recipe("b", "second", None)], TINY, "m", "t", "p", "a" * 16)
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


def test_committed_figures_are_shown_beside_their_like_alone(data):
    def other(**changes):
        changed = copy.deepcopy(data)
        changed["meta"]["config"] |= changes
        return changed

    assert "0.2000 (0.1000 to 0.3000)" in report.beside(data, data)
    budget = other()["meta"]["config"]["budget"] | {"train_tokens": 1}
    for committed, why in (
        (None, "there are none here"),
        (other(model="n"), "model was n, is m"),
        (other(text="u"), "text was u, is t"),
        (other(budget=budget), "train_tokens was 1, is 256"),
    ):
        shown = report.beside(data, committed)
        assert shown.splitlines()[-1] == f"No committed figures beside these: {why}."
        assert "0.2000" in shown and "(0.1000 to 0.3000)" not in shown
    methods = data["meta"]["config"]["methods"]
    changed = report.beside(data, other(methods=methods | {"b": methods["b"] | {"teacher": False}}))
    assert "(0.1000 to 0.3000)" not in changed and re.search(r"^a .*0\.2000 +0\.2000", changed, re.MULTILINE)


def test_another_text_than_the_committed_one_is_named(data):
    committed = copy.deepcopy(data)
    assert report.beside(data, committed).splitlines()[-1].startswith("b ")
    committed["meta"]["config"]["text_digest"] = "b" * 16
    last = report.beside(data, committed).splitlines()[-1]
    assert f"another text than the committed one ({'a' * 16}, not {'b' * 16})" in last
    assert f"text `t` ({'a' * 16})," in report.caption(data)


def test_results_call_the_bundled_model_and_no_other_by_its_name(tmp_path, monkeypatch):
    assert {label(None), label(BUNDLED), label(str(BUNDLED))} == {"models/doc-llama"}
    monkeypatch.chdir(tmp_path)
    assert label("models/doc-llama") == str(tmp_path / "models" / "doc-llama") and label("a/b") == "a/b"


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


def test_committed_results_hold_every_method_and_three_seeds():
    data = read_results(ROOT / "results" / "compare.json")
    assert {(row["method"], row["seed"]) for row in data["rows"]} >= {
        (recipe.name, seed) for recipe in RECIPES for seed in (0, 1, 2)
    }
    now = json.loads(json.dumps({recipe.name: compare.asdict(recipe) for recipe in RECIPES}))
    assert data["meta"]["config"]["methods"] == now, "recipes changed: run make compare ARGS='--seeds 0 1 2 --save'"


def test_bits_of_the_methods_are_close():
    data = read_results(ROOT / "results" / "compare.json")
    bits = [row["bits_per_weight"] for row in data["rows"] if row["method"] != "fp"]
    assert 2 < min(bits) and max(bits) - min(bits) <= 0.05


def test_rates_of_the_methods_are_the_best_of_the_search():
    rows = read_results(ROOT / "results" / "rates.json")["rows"]
    for recipe in RECIPES:
        tried = [r for r in rows if r["method"] == recipe.name]
        if recipe.quant is None or recipe.rates is None:
            assert not tried
            continue
        if not recipe.by_default and not tried:  # the rates of a method that differs from it in one setting
            assert recipe.rates == next(r.rates for r in RECIPES if r.name == recipe.name.rstrip("8"))
            continue
        best = min(tried, key=lambda r: (round(r["kl_qat"], 3), r.get("lr_latents", 0), r["lr_scales"]))
        assert len(tried) == 9 and recipe.rates == {key: best[key] for key in best if key.startswith("lr_")}


def test_readme_states_only_generated_perplexities():
    """Prose outside the generated block carries no perplexity or KL of its own without naming the results file."""
    text = (ROOT / "README.md").read_text()
    prose = text.split(report.START)[0] + text.split(report.END)[1]
    assert not re.search(r"README_[A-Z]+", prose)


def test_results_refuses_other_settings(tmp_path):
    config = settings([RECIPES[0]], TINY, "m", "t", "p", "d")
    Results(tmp_path / "r.json", config).add(row("fp", 0), [])
    assert Results(tmp_path / "r.json", config).has("fp", 0)
    with pytest.raises(ValueError, match="model was m, is n"):
        Results(tmp_path / "r.json", settings([RECIPES[0]], TINY, "n", "t", "p", "d"))


@pytest.mark.parametrize("name", ["sq", "lcqat-planes"])
def test_what_is_scored_is_what_a_file_will_hold(name, place, tmp_path, monkeypatch):
    """Before and after training: rounding to the 16 bits that a file has changes no number of what was scored."""
    teacher, tokenizer = load(place / "model")
    experiment = compare.Experiment(
        teacher, tokenizer, load_text(str(place / "text.txt"), tokenizer), TINY, torch.device("cpu")
    )
    scored = []
    monkeypatch.setattr(
        compare.Experiment, "score", lambda self, model: scored.append(copy.deepcopy(model)) or (1.0, 1.0)
    )
    compare.run_recipe(experiment, next(recipe for recipe in RECIPES if recipe.name == name), 0, 1.0)
    assert len(scored) == 2
    for model in scored:
        held = copy.deepcopy(model)
        to_storage_precision(held)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), held.parameters(), strict=True))
