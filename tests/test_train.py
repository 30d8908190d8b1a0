"""The training loop: where it starts, what it moves and by how much, and that it can be stopped, resumed and trusted.

Checked: the first loss is that of the quantized model; every trainable number gets a gradient and moves, no other
does; the schedule; the distillation loss against torch's own, in value and gradient; one step is its rate in bins;
an interrupted run ends bit by bit like an uninterrupted one; damaged or foreign checkpoints, bad numbers and bad
arguments are refused by name and change nothing; autocast, gradient checkpointing and accelerate.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lcqat_min import convert
from lcqat_min import train as training  # the function: the package's name for it hides the module
from lcqat_min.convert import CODEBOOKS, QuantConfig, quant_layers, quantize
from lcqat_min.evaluate import kl_to
from lcqat_min.train import TrainConfig, bin_width, distillation_loss, parameter_groups, train
