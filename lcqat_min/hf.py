"""`import lcqat_min.hf` teaches transformers to read packed folders: see packing/hf.py. Their config.json names
this."""

from .packing.hf import PackedConfig, PackedQuantizer, num_parameters

__all__ = ["PackedConfig", "PackedQuantizer", "num_parameters"]
