"""The methods that `quantize` can use, by name. LC-QAT is in ptq/lcqat.py; the others are in this room, one file each.

A system is one class with `layer(W, H, bias, generator)` (ptq/method.py says what it is given) and, where its weights
decode differently, a QuantLinear of its own. Add its line to METHODS, and the command line and packed folders know it.
A Recipe in harness/compare.py adds it to the comparison. CONTRIBUTING.md has an example.

    method_of("lsq")()                   the method with its default settings
    layer_of("lsq")                      the class of its layers, for a file that names it
"""

from importlib import import_module

from ..errors import UsageError
from ..layer.linear import QuantLinear
from ..ptq.method import Method

# name -> module, class of the method, class of its layers; imported when asked for
METHODS = {
    "lcqat": ("lcqat_min.ptq.lcqat", "LCQAT", "AffineLinear"),
    "trellis": ("lcqat_min.ptq.trellis", "Trellis", "TrellisLinear"),
    "lsq": ("lcqat_min.systems.lsq", "LSQ", "StepLinear"),
    "free-vq": ("lcqat_min.systems.free_vq", "FreeVQ", "TableLinear"),
}


def _find(name: str, place: int) -> type:
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; this version knows {', '.join(METHODS)}")
    return getattr(import_module(METHODS[name][0]), METHODS[name][place])


def method_of(name: str) -> type[Method]:
    """The class of the method of this name. UsageError for an unknown one."""
    return _find(name, 1)


def layer_of(name: str) -> type[QuantLinear]:
    """The class of the layers that this method makes. UsageError for an unknown one."""
    return _find(name, 2)
