"""Systems: the methods of others, one file each, and the table that names all methods (systems/table.py)."""

from .free_vq import FreeVQ, TableLinear
from .lsq import LSQ, StepLinear
from .table import METHODS, layer_of, method_of

__all__ = ["LSQ", "METHODS", "FreeVQ", "StepLinear", "TableLinear", "layer_of", "method_of"]
