"""`python -m lcqat_min check`: is this machine ready? Offline, with a remedy in each line.

It takes seconds, except the first time: then it builds the text, which takes a minute or two and which notebooks then
need not do.

Each check is a function that returns what it found or raises `Problem` with the remedy. A problem does not stop the
next checks, so one run shows all problems. Needed checks decide the exit code (0: all well, 1: not); optional ones only
say what will be missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from .machine import cores, free_memory

RESTORE = "git checkout -- models in a clone, else pip install --force-reinstall --no-deps lcqat-min"
NEEDED_MEMORY, NEEDED_DISK = 1.5e9, 1e9  # bytes: what `compare` takes at most; runs and caches


class Problem(Exception):
    """Something that will not work; the message ends with the remedy."""


def python() -> str:
    """The interpreter; one that is too old cannot run this."""
    return sys.version.split()[0]


def packages() -> str:
    """All that notebooks and code import is installed."""
    names = ("torch", "numpy", "transformers", "safetensors", "datasets", "tqdm", "matplotlib")
    _installed(names)
    return ", ".join(f"{name} {version(name)}" for name in names[:3])


def arithmetic() -> str:
    """torch computes: a matrix is rounded to 2 bits and comes back close."""
    import torch

    from ..ptq.lcqat import normal_codebook
    from ..ptq.ldlq import round_matrix, row_scales
    from ..ptq.moments import factorize

    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    rounded = round_matrix(W, factorize(torch.eye(64)), normal_codebook("planes", 4, 0), row_scales(W))
    error = (rounded.coded.weight() - W).square().mean().item()
    if not 0.08 < error < 0.12:
        raise Problem(
            f"rounding 64 x 64 normal weights leaves an error of {error:.3f} instead of 0.10. "
            "Install the torch of constraints.txt again."
        )
    return f"{torch.get_num_threads()} threads; 2-bit error {error:.2f} of 1"


def model() -> str:
    """The bundled model loads and predicts."""
    import torch

    from ..harness.models import BUNDLED, load

    try:
        net, tokenizer = load(BUNDLED)
    except ValueError as error:
        raise Problem(f"{error} Restore it: {RESTORE}") from error
    ids = tokenizer("Return the", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = net(input_ids=ids).logits
    if not torch.isfinite(logits).all():
        raise Problem(f"the bundled model predicts NaN: its file is damaged. Restore it: {RESTORE}")
    return f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} million parameters"


def text() -> str:
    """The offline text can be built, or is cached."""
    from ..harness.models import BUNDLED, load_tokenizer
    from ..harness.text import load_text

    print("building or reading the text ...", file=sys.stderr, flush=True)
    try:
        splits = load_text("docstrings", load_tokenizer(BUNDLED))
    except (ValueError, OSError) as error:
        raise Problem(f"{error} If the cache cannot be written, set LCQAT_CACHE to a folder that can.") from error
    return f"{len(splits.train) / 1e6:.1f} million training tokens"


def memory() -> str:
    """Enough memory is free, also within the limits of a container."""
    if (found := free_memory()) is None:  # macOS and Windows
        return "this system does not say"
    free, limited = found
    if free < NEEDED_MEMORY:
        remedy = "close other programs"
        if limited:
            remedy = "raise the limit of this container or batch job, for example docker run --memory 4g"
        raise Problem(f"{free / 1e9:.1f} GB are free, and the comparison needs {NEEDED_MEMORY / 1e9:.1f} GB: {remedy}.")
    return f"{free / 1e9:.0f} GB free" + (", the limit of a control group" if limited else "")


def processors() -> str:
    """The cores are free, and torch does not use more threads than cores."""
    import torch

    allowed, threads = cores(), torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    if load > allowed + 1:  # this process is part of the load
        raise Problem(
            f"the machine is busy: cores {allowed:g}, load {load:.1f}. Everything will take longer, and times mean "
            "little. Close other programs, or wait."
        )
    if threads > math.ceil(allowed):
        raise Problem(
            f"{allowed:g} of {os.cpu_count()} cores may be used (control group or taskset), and torch has {threads} "
            f"threads, which slow each other down. Set OMP_NUM_THREADS={math.ceil(allowed)}."
        )
    return f"{allowed:g} of {os.cpu_count()} cores, load {load:.1f}"


def disk() -> str:
    """Enough disk is free where runs are written."""
    free = shutil.disk_usage(".").free
    if free < NEEDED_DISK:
        raise Problem(f"{free / 1e9:.1f} GB are free here, and runs and caches take up to 1 GB. Delete something.")
    return f"{free / 1e9:.0f} GB free"


def notebooks() -> str:
    """Jupyter and a kernel are installed."""
    _installed(("jupyterlab", "ipykernel"))
    return f"jupyterlab {version('jupyterlab')}: start with `make lab`, or `{sys.executable} -m jupyter lab notebooks`"


def triton() -> str:
    """Triton, for the lesson on kernels."""
    try:
        return f"triton {version('triton')}"
    except PackageNotFoundError:
        raise Problem(
            "not installed: torch does its work, and notebook 10 says what it skips. "
            "On Linux: pip install -e '.[kernels]'."
        ) from None


def gpu() -> str:
    """A CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise Problem("none: nothing here needs one.")
    return torch.cuda.get_device_name(0)


NEEDED = (python, packages, arithmetic, model, text, memory, disk, notebooks)
OPTIONAL = (processors, triton, gpu)


def run_check(args: argparse.Namespace) -> int:
    """Run all checks and print one line for each; 0 if all that is needed is well, else 1."""
    well = True
    for examine in (*NEEDED, *OPTIONAL):
        ok, found = _verdict(examine)
        mark = "ok" if ok else "PROBLEM" if examine in NEEDED else "note"
        print(f"{mark:<9}{examine.__name__:<12}{found}", flush=True)
        well &= ok or examine in OPTIONAL
    print("All that is needed is here." if well else "Solve the lines marked PROBLEM, then run this again.")
    return 0 if well else 1


def _installed(names: tuple[str, ...]) -> None:
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise Problem(
            f"{sys.executable} cannot import {', '.join(missing)}. Set up .venv as README.md says (`make setup`), and "
            "use the Python in there."
        )


def _verdict(examine: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, examine()
    except Problem as problem:
        return False, str(problem)
    except Exception as error:  # one broken part must not hide the state of the others
        return False, f"{type(error).__name__}: {error}. Run `make setup` again; if it stays, report this line."
