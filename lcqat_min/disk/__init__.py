"""Files that are written whole or not at all, by one process at a time."""

from .locks import alone
from .tensor_file import reading, save_tensors

__all__ = ["alone", "reading", "save_tensors"]
