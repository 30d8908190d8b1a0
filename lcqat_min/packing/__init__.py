"""Packed layers, and what a file holds."""

from ..codebook.bitstring import pack_bits, unpack_bits
from .convert import pack_layers, to_storage_precision, unpack_layers
from .files import export_dense, load_packed, save_packed
from .layer import Form, PackedLinear
from .size import Bits, CodeStats, bits_per_weight, code_stats, codes_of

__all__ = [
    "Bits",
    "CodeStats",
    "Form",
    "PackedLinear",
    "bits_per_weight",
    "code_stats",
    "codes_of",
    "export_dense",
    "load_packed",
    "pack_bits",
    "pack_layers",
    "save_packed",
    "to_storage_precision",
    "unpack_bits",
    "unpack_layers",
]
