"""Files that are written whole or not at all, by one process at a time."""

from .tensor_file import reading, save_tensors
from .whole_file import alone

__all__ = ["alone", "reading", "save_tensors"]
