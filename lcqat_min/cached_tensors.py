"""Small constant tensors (a Hadamard matrix, the digits of a byte), made once and kept.

Like functools.lru_cache, with two differences that tensors ask for. A constant that is first made in an evaluation
must serve training, too, so it is made outside of inference mode. And one that is first made while a program is traced
(torch.export, FakeTensorMode) is a tensor without numbers, which must not be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def made_once(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator: make(*key) is called once for each key. All callers share the tensor: do not write to it."""
    kept: dict[tuple, Tensor] = {}

    @wraps(make)
    def recall(*key: object) -> Tensor:
        if key in kept:
            return kept[key]
        with torch.inference_mode(False):
            made = make(*key)
        if type(made) is Tensor:
            kept[key] = made
        return made

    recall.cache_clear = kept.clear
    return recall
