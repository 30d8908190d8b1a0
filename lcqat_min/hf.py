"""`import lcqat_min.hf` teaches transformers to read packed folders: see packing/hf.py. Their config.json names
this module."""

from .packing.hf import PackedConfig, PackedQuantizer

__all__ = ["PackedConfig", "PackedQuantizer"]
