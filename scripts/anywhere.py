"""Run unit tests and notebooks as they would run on other machines: `make anywhere`, or some conditions by name.

    python scripts/anywhere.py                    all conditions, in turn: about an hour on 2 cores
    python scripts/anywhere.py avx2 threads-4     only these
    python scripts/anywhere.py --one-of SEED      one other processor, chosen by a hexadecimal number (a commit's)

Sums of floating-point numbers depend on the order in which a processor adds, so a test that asks for equal bits, or a
notebook that claims more than its numbers hold, may be green on one machine and red on another. A condition changes one
thing that machines differ in: the instruction set that torch, oneDNN and MKL may use, the order in which products are
summed, the number of threads (`make test` runs with one), the order of the tests, the offline text, or the versions of
all packages. Logs go to runs/anywhere/; the exit code says whether all was green. A condition that has ended green is
not run again while the files are the same, so a run that was stopped goes on where it was.

Limits: the instruction sets of one processor stand for other processors; ARM and GPUs have to be tried on their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "runs" / "anywhere"
OFFLINE = {
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "passive",
}
LEFT_OUT = ("sympy", "pandas")  # packages without whose docstrings the other text is made
OLD = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
SEES_THIS, THIS = {"PYTHONPATH": str(ROOT / "scripts")}, ("-p", "anywhere")  # this file as a plugin of pytest


@dataclass(frozen=True)
class Condition:
    """environment: variables that are set. options: more of them for pytest. prepare: called first, returns the
    Python to use and more variables."""

    what: str
    environment: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()  # the module that `-p` names is this file
    prepare: Callable[[], tuple[str, dict[str, str]]] = lambda: (sys.executable, {})
    notebooks: bool = True


def other_text() -> tuple[str, dict[str, str]]:
    """A cache that holds the offline text of a machine without two of the packages, under the name of this one's."""
    from transformers import AutoTokenizer

    from lcqat_min.harness import corpus as docstrings
    from lcqat_min.harness import text
    from lcqat_min.harness import text_cache as cache
    from lcqat_min.harness.models import BUNDLED

    tokenizer = AutoTokenizer.from_pretrained(str(BUNDLED))
    name = cache.fingerprint("docstrings", tokenizer)
    rest = tuple(package for package in docstrings.PACKAGES if package not in LEFT_OUT)
    with patch.object(docstrings, "PACKAGES", rest), patch.object(cache, "fingerprint", lambda *_: name):
        text.load_text("docstrings", tokenizer, cache_dir=LOGS / "other-text")
    return sys.executable, {"LCQAT_CACHE": str(LOGS / "other-text")}


def newest() -> tuple[str, dict[str, str]]:
    """A virtual environment with the newest versions that pyproject.toml allows; needs a network once."""
    folder = LOGS / "newest"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[notebooks,test,kernels]"]
        subprocess.run(install, check=True, cwd=folder)
        (folder / "ready").touch()
    return str(python), {}


def sums() -> tuple[str, dict[str, str]]:
    """A profile of IPython that changes the kernels of the notebooks as `pytest_configure` changes the unit tests."""
    startup = LOGS / "ipython" / "profile_default" / "startup" / "sums.py"
    startup.parent.mkdir(parents=True, exist_ok=True)
    startup.write_text("import anywhere\nanywhere.sum_in_another_order()\n", encoding="utf-8")
    return sys.executable, {"IPYTHONDIR": str(LOGS / "ipython")}


def sum_in_another_order() -> None:
    """From now on, products of matrices with an odd number of rows are summed from the last term to the first."""
    import torch

    def product(a, b):
        if a.shape[0] % 2:
            a, b = a.flip(1), b.flip(0)
        return torch.bmm(a[None], b[None])[0]

    def addmm(c, a, b, *, beta=1, alpha=1):
        return alpha * product(a, b) + (beta * c if beta else 0)

    kernels = {
        "mm": product,
        "mm.out": lambda a, b, *, out: out.copy_(product(a, b)),
        "addmm": addmm,
        "addmm_": lambda c, a, b, *, beta=1, alpha=1: c.copy_(addmm(c, a, b, beta=beta, alpha=alpha)),
        "addmm.out": lambda c, a, b, *, beta=1, alpha=1, out: out.copy_(addmm(c, a, b, beta=beta, alpha=alpha)),
    }
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that kernels are replaced
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU", allow_override=True)
    sum_in_another_order.library = library  # kernels live as long as it does


CONDITIONS = {
    "avx2": Condition("torch, oneDNN and MKL with AVX2: most laptops", AVX2),
    "old": Condition("torch, oneDNN and MKL with what every x86-64 has", OLD),
    "sums": Condition(
        "products summed in an order that depends on their shape", SEES_THIS | {"ANYWHERE": "sums"}, THIS, sums
    ),
    "threads-2": Condition("two threads", {"OMP_NUM_THREADS": "2"}),
    "threads-4": Condition("four threads", {"OMP_NUM_THREADS": "4"}),
    "backwards": Condition(
        "tests in the opposite order", SEES_THIS | {"ANYWHERE": "backwards"}, THIS, notebooks=False
    ),  # each of them is a process, and its cells have an order
    "other-text": Condition(f"offline text without {' and '.join(LEFT_OUT)}", prepare=other_text),
    "newest": Condition("the newest versions of all packages", prepare=newest),
}
PROCESSORS = ("avx2", "old", "sums")


def pytest_configure() -> None:
    """Called by pytest where this file is its plugin."""
    if os.environ["ANYWHERE"] == "sums":
        sum_in_another_order()


def pytest_collection_modifyitems(items: list) -> None:
    """Called by pytest where this file is its plugin."""
    if os.environ["ANYWHERE"] == "backwards":
        items.reverse()


def run(name: str) -> dict:
    """Try a condition; returns what it came to: exit codes, summaries and seconds of both parts."""
    condition = CONDITIONS[name]
    python, more = condition.prepare()
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # two processes on two cores
    environment = os.environ | OFFLINE | threads | condition.environment | more
    tests = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-rfE", *condition.options]
    notebooks = [*tests, "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=1200", "notebooks"]
    outcome = {}
    for part, command in (("unit tests", tests), ("notebooks", notebooks))[: 1 + condition.notebooks]:
        log = LOGS / f"{name}-{part.split()[0]}.txt"
        clock = time.monotonic()
        with open(log, "w", encoding="utf-8") as stream:
            code = subprocess.call(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        for line in lines:
            if line.startswith(("FAILED", "ERROR")):
                print(f"    {line[:200]}", flush=True)
        last = next((line for line in reversed(lines) if " in " in line), "no summary")
        outcome[part] = {"code": code, "summary": last.strip("= "), "seconds": round(time.monotonic() - clock)}
        print(f"  {name:<14}{part:<12}{outcome[part]['summary']}", flush=True)
    return outcome


def commit() -> str:
    """What is tried: the commit, and what differs from it."""
    said = [
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout
        for words in (("rev-parse", "HEAD"), ("diff", "HEAD"))
    ]
    return "".join(said)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", metavar="CONDITION", help=f"{', '.join(CONDITIONS)} (default: all)")
    options.add_argument("--one-of", metavar="SEED", help=f"one of {', '.join(PROCESSORS)}, chosen by this number")
    args = options.parse_args()
    names = args.names or list(CONDITIONS)
    if args.one_of:
        names = [PROCESSORS[int(args.one_of, 16) % len(PROCESSORS)]]
    if unknown := [name for name in names if name not in CONDITIONS]:
        options.error(f"unknown condition {', '.join(unknown)}; choose from {', '.join(CONDITIONS)}")
    LOGS.mkdir(parents=True, exist_ok=True)
    tried, done = commit(), LOGS / "done.json"
    before = json.loads(done.read_text(encoding="utf-8")) if done.exists() else {}
    outcomes = before["outcomes"] if before.get("commit") == tried else {}
    for number, name in enumerate(names, start=1):
        print(f"[{number}/{len(names)}] {name}: {CONDITIONS[name].what}", flush=True)
        if name in outcomes and not any(part["code"] for part in outcomes[name].values()):
            print("  was green before")
            continue
        outcomes[name] = run(name)
        part = done.with_suffix(".part")
        part.write_text(json.dumps({"commit": tried, "outcomes": outcomes}, indent=1), encoding="utf-8")
        os.replace(part, done)
    red = [name for name in names if any(part["code"] for part in outcomes[name].values())]
    print(f"{len(names) - len(red)} passed, {len(red)} failed" + (f": {', '.join(red)}; logs in {LOGS}" if red else ""))
    return bool(red)


if __name__ == "__main__":
    sys.exit(main())
