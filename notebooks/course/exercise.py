"""Checks for the exercises: hand in a function, get a verdict in words.

    check(my_function)            in a notebook; the function's name says which exercise it is

A check is a function decorated with `@exercise` in ex_NN.py that has the name of the student's function. It calls what
it was handed, compares with values worked out by hand or by a slow obvious version, and raises `Wrong` with a
sentence that says what is off. A stub raises NotImplementedError. `check` never raises, so a notebook with open
exercises still runs from top to bottom.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

CHECKS: dict[str, Callable[[Callable], None]] = {}


class Wrong(Exception):
    """The answer is not right yet; the message says why, to the student."""


@dataclass(frozen=True)
class Verdict:
    """state: "open" (not attempted), "wrong" or "right"."""

    state: str
    message: str


def exercise(examine: Callable[[Callable], None]) -> Callable[[Callable], None]:
    """Register `examine(answer)` as the check of the exercise of its name."""
    if examine.__name__ in CHECKS:
        raise ValueError(f"two exercises are called {examine.__name__}; rename one")
    CHECKS[examine.__name__] = examine
    return examine


def verdict(answer: Callable) -> Verdict:
    """What a check says about an answer."""
    _load()
    name = getattr(answer, "__name__", repr(answer))
    if name not in CHECKS:
        raise ValueError(f"there is no exercise called {name!r}; choose one of {', '.join(sorted(CHECKS))}")
    try:
        CHECKS[name](answer)
    except NotImplementedError:
        return Verdict("open", f"{name}: not attempted yet. Replace the last line and run the cell again.")
    except Wrong as reason:
        return Verdict("wrong", f"{name}: not yet. {reason}")
    except Exception as error:  # whatever the student's code raises is theirs to see, in one line
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict("wrong", f"{name}: stopped with {type(error).__name__}: {error} (in line: {where.line})")
    return Verdict("right", f"{name}: right.")


def check(answer: Callable) -> None:
    """Print the verdict on an answer."""
    print(verdict(answer).message)


def expect_close(got: object, wanted: object, what: str, tolerance: float = 1e-4) -> None:
    """Raise Wrong unless `got` is a number or tensor within `tolerance` of `wanted`."""
    if got is None:
        raise Wrong(f"{what} is None: does the function return its result?")
    try:
        got, wanted = (torch.as_tensor(value, dtype=torch.float64) for value in (got, wanted))
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{what} is a {type(got).__name__}; a number or a tensor is wanted.") from None
    if got.shape != wanted.shape:
        raise Wrong(f"{what} has shape {list(got.shape)}; {list(wanted.shape)} is wanted.")
    if not torch.allclose(got, wanted, atol=tolerance, rtol=tolerance):
        off = (got - wanted).abs().flatten().argmax()
        shown = f"{got.flatten()[off].item():.4g} where {wanted.flatten()[off].item():.4g} is right"
        raise Wrong(f"{what} is off: {shown}.")


def _load() -> None:
    for path in sorted(Path(__file__).parent.glob("ex_*.py")):
        importlib.import_module(f"{__package__}.{path.stem}")
