"""Packed layers, and what a file holds."""

from .convert import pack_layers, to_storage_precision, unpack_layers
from .files import export_dense, load_packed, save_packed
from .layer import PackedLinear, PackedSpec
from .size import Bits, bits_per_weight

__all__ = [
    "Bits",
    "PackedLinear",
    "PackedSpec",
    "bits_per_weight",
    "export_dense",
    "load_packed",
    "pack_layers",
    "save_packed",
    "to_storage_precision",
    "unpack_layers",
]
