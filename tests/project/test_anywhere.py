"""Conditions of other machines are what they say: sums in another order, one processor per commit, exit codes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lcqat_min.harness import corpus as docstrings
from lcqat_min.harness import text
from lcqat_min.harness.models import BUNDLED

ROOT = Path(__file__).resolve().parents[2]
SUMS = """
import sys
sys.path.insert(0, {scripts!r})
import torch, anywhere
a, b, c = torch.randn(301, 300), torch.randn(300, 40), torch.randn(301, 40)
before = [a @ b, torch.addmm(c, a, b, alpha=2), torch.nn.functional.linear(a, b.T, c[0])]
anywhere.sum_in_another_order()
after = [a @ b, torch.addmm(c, a, b, alpha=2), torch.nn.functional.linear(a, b.T, c[0])]
for one, other in zip(before, after):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert not torch.equal(one, other)
assert not torch.equal((a @ b)[:8], a[:8] @ b)  # an even number of rows
"""


@pytest.fixture
def anywhere(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("anywhere", ROOT / "scripts" / "anywhere.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["anywhere"] = module
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOGS", tmp_path)
    yield module
    del sys.modules["anywhere"]


def test_sums_come_in_an_order_that_depends_on_the_shape():
    program = SUMS.format(scripts=str(ROOT / "scripts"))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_other_text_lies_where_that_of_this_machine_is_looked_for(anywhere, monkeypatch):
    pages = [f"{i} " + "a page that is long enough to be a text " * 4 for i in range(2000)]
    monkeypatch.setattr(text, "docstrings", lambda: pages if "sympy" in docstrings.PACKAGES else pages[:1500])
    tokenizer = AutoTokenizer.from_pretrained(str(BUNDLED))
    own = text.load_text("docstrings", tokenizer, cache_dir=anywhere.LOGS / "own")
    python, environment = anywhere.other_text()
    other = text.load_text("docstrings", tokenizer, cache_dir=Path(environment["LCQAT_CACHE"]))
    assert python == sys.executable and len(other.train) < 0.9 * len(own.train)
    assert text.load_text("docstrings", tokenizer, cache_dir=anywhere.LOGS / "own").digest == own.digest


def test_each_commit_chooses_one_processor(anywhere, monkeypatch):
    tried = []
    monkeypatch.setattr(anywhere, "run", lambda name: tried.append(name) or {"unit tests": {"code": 0}})
    for seed in ("0", "1", "a"):
        monkeypatch.setattr(sys, "argv", ["anywhere.py", "--one-of", seed])
        assert anywhere.main() == 0
    assert sorted(tried) == ["avx2", "old"]  # 0, 1, and 10 is 1 again: green already, so not tried twice


def test_a_red_part_is_a_red_run_and_is_tried_again(anywhere, monkeypatch, capsys):
    codes = iter((1, 0))
    monkeypatch.setattr(anywhere, "run", lambda name: {"unit tests": {"code": 0}, "notebooks": {"code": next(codes)}})
    monkeypatch.setattr(sys, "argv", ["anywhere.py", "avx2"])
    assert anywhere.main() == 1 and "0 passed, 1 failed: avx2" in capsys.readouterr().out
    assert anywhere.main() == 0 and "1 passed, 0 failed" in capsys.readouterr().out
