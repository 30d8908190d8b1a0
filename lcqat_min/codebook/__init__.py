"""Codebooks: an index becomes d weights, w = A q + b or a row of a table; in a trellis, vectors overlap."""

from .affine import AffineCodebook, frame_planes, lattice, random_planes, scalar
from .bitstring import pack_bits, unpack_bits
from .digits import digits_of, index_of
from .lloyd import fit, mean_squared_error
from .matrix import Codebook, CodedMatrix
from .search import nearest
from .table import TableCodebook, table_start
from .trellis import TrellisCodebook

__all__ = [
    "AffineCodebook",
    "Codebook",
    "CodedMatrix",
    "TableCodebook",
    "TrellisCodebook",
    "digits_of",
    "fit",
    "frame_planes",
    "index_of",
    "lattice",
    "mean_squared_error",
    "nearest",
    "pack_bits",
    "random_planes",
    "scalar",
    "table_start",
    "unpack_bits",
]
