"""Methods for tests, by the kind of their codebook."""

from lcqat_min import LCQAT
from lcqat_min.ptq import Method
from lcqat_min.ptq.trellis import Trellis
from lcqat_min.systems.free_vq import FreeVQ
from lcqat_min.systems.lsq import LSQ

KINDS = ("scalar", "lattice", "planes", "trellis", "step", "table")


def method(kind: str = "planes", **settings: object) -> Method:
    """LC-QAT's three codebooks, the trellis, LSQ ("step") and the free table ("table"); settings that a kind does not
    have are left
    out, so that one set of them serves all."""
    if kind == "step":
        return LSQ(**{key: value for key, value in settings.items() if key in LSQ.__dataclass_fields__})
    if kind == "table":
        return FreeVQ(**{key: value for key, value in settings.items() if key in FreeVQ.__dataclass_fields__})
    if kind == "trellis":
        small = {"reach": 1} | settings | {"sweeps": 0}
        return Trellis(**{key: value for key, value in small.items() if key in Trellis.__dataclass_fields__})
    return LCQAT(codebook=kind, **settings)
