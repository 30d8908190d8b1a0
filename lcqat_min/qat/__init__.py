"""Quantization-aware training: train(model, batches, config, teacher)."""

from .config import TrainConfig
from .loop import parameter_groups, train
from .loss import distillation_loss

__all__ = ["TrainConfig", "distillation_loss", "parameter_groups", "train"]
