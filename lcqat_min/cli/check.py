"""`python -m lcqat_min check`: will everything run on this machine? Offline, with a remedy in each line.

It takes seconds, except the first time: then it builds the text, which takes a minute or two and spares notebooks the
wait.

Each check is a function that returns what it found or raises `Problem` with the remedy. A problem does not stop the
checks after it, so one run shows all there is to mend. Needed checks decide the exit code (0: all well, 1: not);
optional ones only say what will be missing.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from .machine import cores, free_memory, others

RESTORE = "git checkout -- models in a clone, else pip install --force-reinstall --no-deps lcqat-min"
NEEDED_MEMORY, NEEDED_DISK = 3e9, 1e9  # bytes: `compare` peaks at half of this; caches and runs


class Problem(Exception):
    """Something that will not work; the message ends with the remedy."""


def python() -> str:
    """The interpreter; one that is too old does not get as far as this."""
    return sys.version.split()[0]


def packages() -> str:
    """All that notebooks and code import is there."""
    names = ("torch", "numpy", "transformers", "safetensors", "datasets", "tqdm", "matplotlib")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise Problem(
            f"{', '.join(missing)} cannot be imported by {sys.executable}. Set up .venv as README.md says "
            "(`make setup`), and use the Python in there."
        )
    return ", ".join(f"{name} {version(name)}" for name in names[:3])


def arithmetic() -> str:
    """torch computes: a layer is rounded to 2 bits and comes back close."""
    import torch

    from ..ptq.ldlq import round_matrix, row_scales
    from ..ptq.matrix import normal_codebook
    from ..ptq.moments import factorize

    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    rounded = round_matrix(W, factorize(torch.eye(64)), normal_codebook("planes", 4, 0), row_scales(W))
    error = (rounded.weight() - W).square().mean().item()
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
    from transformers import AutoTokenizer

    from ..harness.models import BUNDLED
    from ..harness.text import load_text

    print("building or reading the text ...", file=sys.stderr, flush=True)
    try:
        splits = load_text("docstrings", AutoTokenizer.from_pretrained(str(BUNDLED)))
    except (ValueError, OSError) as error:
        raise Problem(f"{error} If the cache cannot be written, set LCQAT_CACHE to a folder that can.") from error
    return f"{len(splits.train) / 1e6:.1f} million tokens to train on"


def memory() -> str:
    """Enough memory is free, and not only for others."""
    if (found := free_memory()) is None:  # macOS and Windows
        return "this system does not say"
    free, limited = found
    if free < NEEDED_MEMORY / 2:
        remedy = (
            (
                "a control group (container, batch job) allows no more. Give it a higher limit, for example "
                "docker run --memory 4g"
            )
            if limited
            else "close other programs"
        )
        raise Problem(f"{free / 1e9:.1f} GB are free, and the comparison needs about 1.5 GB: {remedy}.")
    return f"{free / 1e9:.0f} GB free" + (", as a control group allows" if limited else "")


def processors() -> str:
    """The cores are ours, and torch uses as many threads."""
    import torch

    allowed, threads, busy = cores(), torch.get_num_threads(), others()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    if sum(share for _, share in busy) > allowed / 4 or load > allowed + 1:  # this process is part of the load
        most = "".join(f", {share:.1f} by {name}" for name, share in busy[:3])
        raise Problem(
            f"the machine is busy: cores {allowed:g}, load {load:.1f}{most}. All will take longer, and times "
            "mean little. Close other programs, or wait."
        )
    if threads > math.ceil(allowed):
        raise Problem(
            f"{allowed:g} of {os.cpu_count()} cores may be used (control group or taskset), and torch has "
            f"{threads} threads, which slow each other down. Set OMP_NUM_THREADS={math.ceil(allowed)}."
        )
    return f"{allowed:g} of {os.cpu_count()} cores, load {load:.1f}"


def disk() -> str:
    """Enough disk is free where runs are written."""
    free = shutil.disk_usage(".").free
    if free < NEEDED_DISK:
        raise Problem(f"{free / 1e9:.1f} GB are free here. Make room: runs and caches take up to 1 GB.")
    return f"{free / 1e9:.0f} GB free"


def notebooks() -> str:
    """Jupyter and a kernel are there."""
    missing = [name for name in ("jupyterlab", "ipykernel") if importlib.util.find_spec(name) is None]
    if missing:
        raise Problem(
            f"{' and '.join(missing)} cannot be imported. Run `make setup`, or pip install -e '.[notebooks]'."
        )
    return f"jupyterlab {version('jupyterlab')}: start with `make lab`, or `{sys.executable} -m jupyter lab notebooks`"


def triton() -> str:
    """Triton, for the kernel's lesson."""
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


def check() -> bool:
    """Run all checks, print one line for each; whether all that is needed is well."""
    well = True
    for examine in (*NEEDED, *OPTIONAL):
        ok, found = _verdict(examine)
        mark = "ok" if ok else "PROBLEM" if examine in NEEDED else "note"
        print(f"{mark:<9}{examine.__name__:<12}{found}", flush=True)
        well &= ok or examine in OPTIONAL
    print("All that is needed is here." if well else "Mend the lines marked PROBLEM, then run this again.")
    return well


def _verdict(examine: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, examine()
    except Problem as problem:
        return False, str(problem)
    except Exception as error:  # one broken part must not hide the state of the others
        return False, f"{type(error).__name__}: {error}. Run `make setup` again; if it stays, report this line."
