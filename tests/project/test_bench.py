"""`make bench` names the bars that are missed and then ends with exit code 1, on invented figures.

pytest tests/project/test_bench.py
"""

import importlib.util
import sys
from pathlib import Path

import pytest

from lcqat_min.harness.results import read_results

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The script, which writes below tmp_path and measures nothing."""
    spec = importlib.util.spec_from_file_location("bench_cpu", ROOT / "scripts" / "bench_cpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["bench_cpu.py"])
    for name in ("feedback", "affine", "saved", "steps"):
        monkeypatch.setattr(module, name, lambda *_: {})
    return module


def test_all_bars_are_met_by_figures_on_them(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "steps", lambda repeats: bench.BARS)
    assert bench.main() == 0 and "MISSED" not in capsys.readouterr().out
    assert len(read_results(bench.ROOT / "results" / "bench_cpu.json")["rows"]) == len(bench.BARS)


@pytest.mark.parametrize("figure, said", [(1.41, "1.41, at most 1.40"), (float("nan"), "nan, at most 1.40")])
def test_a_missed_bar_is_named(bench, monkeypatch, capsys, figure, said):
    monkeypatch.setattr(bench, "steps", lambda repeats: bench.BARS | {"step sq": figure})
    assert bench.main() == 1
    assert [line for line in capsys.readouterr().out.splitlines() if "MISSED" in line] == [f"MISSED  step sq: {said}"]


def test_a_bar_without_a_figure_is_missed(bench):
    figures = {what: 0.0 for what in bench.BARS if what != "affine planes"}
    assert bench.missed(figures) == ["affine planes: not measured"]


def test_the_committed_figures_meet_the_bars(bench):
    rows = read_results(ROOT / "results" / "bench_cpu.json")["rows"]
    assert {row["what"]: row["bar"] for row in rows if row["bar"]} == bench.BARS
    assert bench.missed({row["what"]: row["ratio"] for row in rows}) == []
