"""Checks of the exercises in notebook 11."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .exercise import Wrong, exercise, expect_close


@exercise
def lean_gigabytes(answer: Callable) -> None:
    """34.25 bytes per quantized weight with two latents, 18.25 with one; 18 per parameter of the rest."""
    got = answer(1e9, 0.0, 2)
    if got is not None and abs(got - 34.25e9) < 1:
        raise Wrong("The result is in bytes; divide by 10^9.")
    if got is not None and abs(got - 54.25) < 0.01:
        raise Wrong("You counted what autograd keeps; with gradient checkpointing leave it out.")
    if got is not None and abs(got - 36.5) < 0.01:
        raise Wrong("Teacher and index belong to a weight, not to a latent: count them once.")
    if got is not None and abs(got - 36.25) < 0.01:
        raise Wrong("Your teacher takes 4 bytes per weight, as in float32; in bf16 it takes 2.")
    expect_close(got, 34.25, "the GB for 1e9 quantized weights with two latents")
    expect_close(answer(1e9, 0.0, 1), 18.25, "the GB for 1e9 quantized weights with one latent")
    expect_close(answer(0.0, 1e9, 2), 18.0, "the GB for 1e9 parameters that are not quantized")


class Small(nn.Module):
    """Two blocks, a head tied to the embeddings, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"up": nn.Linear(4, 6), "norm": nn.LayerNorm(6), "down": nn.Linear(6, 4)}) for _ in "ab"]
        )
        self.extra = nn.Linear(4, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


@exercise
def taken_layers(answer: Callable) -> None:
    """All but the tied head; without those whose names contain a part of skip."""
    wanted = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "extra"]
    for skip in ((), ("blocks.0.",), ("up", "extra")):
        left = [name for name in wanted if not any(part in name for part in skip)]
        got = answer(Small(), skip)
        if got is None:
            raise Wrong("The result is None: does the function return its list?")
        got = list(got)
        if "head" in got:
            raise Wrong("The head shares its weight with the embeddings; rounding it would round those as well.")
        if missing := [name for name in left if name not in got]:
            raise Wrong(f"With skip = {skip} the layer {missing[0]!r} is missing.")
        if more := [name for name in got if name not in left]:
            raise Wrong(f"With skip = {skip} the layer {more[0]!r} should not be there.")
        if got != left:
            raise Wrong("The order is not that of named_modules().")
    untied = Small()
    untied.head = nn.Linear(4, 8, bias=False)
    if "head" not in list(answer(untied, ())):
        raise Wrong("A head with a weight of its own is a linear layer like others, unless skip names it.")


@exercise
def steps_needed(answer: Callable) -> None:
    """4 processes of 4 sequences of 256 tokens see 4096 tokens per step."""
    got = answer(40_960, 256, 4, 4)
    if got == 40:
        raise Wrong("40,960 tokens with 4 processes: each sees its own 1024 tokens per step, together 4096.")
    if isinstance(got, float) and not got.is_integer():
        raise Wrong(f"The result is {got}; a number of steps is whole.")
    expect_close(got, 10, "the steps for 40,960 tokens in windows of 256, batches of 4, 4 processes")
    got = answer(40_961, 256, 4, 4)
    if got == 10 or (isinstance(got, float) and not got.is_integer()):
        raise Wrong("One token more than ten steps show needs an eleventh step: round up.")
    expect_close(got, 11, "the steps for 40,961 tokens in windows of 256, batches of 4, 4 processes")
    expect_close(answer(1, 256, 4, 1), 1, "the steps for a single token")
