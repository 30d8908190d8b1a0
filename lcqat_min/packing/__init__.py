"""Packed layers, and what a file holds."""

from .convert import pack_layers, to_storage_precision, unpack_layers
from .files import export_dense, load_packed, save_packed
from .layer import PackedLinear, PackedSpec, pack_bits, unpack_bits
from .size import Bits, bits_per_weight

__all__ = [
    "Bits",
    "PackedLinear",
    "PackedSpec",
    "bits_per_weight",
    "export_dense",
    "load_packed",
    "pack_bits",
    "pack_layers",
    "save_packed",
    "to_storage_precision",
    "unpack_bits",
    "unpack_layers",
]
