"""What quantization-aware training costs on a CPU: ratios inside one run, by CPU time of one thread.

    python scripts/bench_cpu.py          writes results/bench_cpu.json and prints it

Each ratio has a bar, the most that it may be. Missed bars are named at the end, and the exit code is then 1.

CPU time of one thread (time.process_time) hardly moves when other programs run; wall time does. Each figure is the
median of interleaved repeats of two things of the same run, so that a slow or a busy machine changes both.

    step        one optimizer step of a Llama of the bundled size, 2048 tokens, over the same step of the plain model
    teacher     the same with the distillation target computed in the step
    feedback    error-feedback rounding of a 1024 x 1024 matrix over one product W H of that size
    search      the same for a trellis of 2 bits, whose search looks ahead
    affine      decoding latents through A q + b and back, over a nearest-codeword lookup with the same gradient path
    saved       bytes that autograd keeps for one layer beyond those of nn.Linear, over the bytes of its weight
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lcqat_min import codebook as cb
from lcqat_min.harness.compare import RECIPES
from lcqat_min.harness.results import describe, write_json
from lcqat_min.layer.linear import AffineLinear
from lcqat_min.ptq.lcqat import normal_codebook
from lcqat_min.ptq.ldlq import ldlq_round, plain_round, row_scales
from lcqat_min.ptq.model import quantize
from lcqat_min.ptq.moments import factorize
from lcqat_min.ptq.trellis import Trellis
from lcqat_min.ptq.viterbi import viterbi_round
from lcqat_min.qat.config import TrainConfig
from lcqat_min.qat.loop import parameter_groups
from lcqat_min.qat.loss import distillation_loss

ROOT = Path(__file__).resolve().parents[1]
BARS = {
    "step sq": 1.40,
    "step lcqat-release": 1.40,
    "step lcqat-paper": 1.40,
    "step lcqat-planes": 1.60,
    "step lcqat-trellis": 1.70,
    "teacher sq": 1.9,
    "teacher lcqat-release": 1.9,
    "teacher lcqat-paper": 1.9,
    "teacher lcqat-planes": 2.1,
    "teacher lcqat-trellis": 2.2,
    "feedback scalar": 8.0,  # these five are over a product of matrices, in whose speed processors differ most
    "feedback lattice": 8.0,
    "feedback planes": 8.0,
    "search reach 2": 70.0,
    "search reach 3": 240.0,
    "affine lattice": 0.4,
    "affine planes": 0.4,
}


def ratio(one: Callable, base: Callable, repeats: int) -> float:
    """Median CPU time of `one` over that of `base`, run in turns; each is warmed up once."""
    times: dict[Callable, list[float]] = {one: [], base: []}
    for call in (one, base):
        call()
    for _ in range(repeats):
        for call in (base, one):
            begun = time.process_time()
            call()
            times[call].append(time.process_time() - begun)
    return statistics.median(times[one]) / statistics.median(times[base])


def small_llama() -> nn.Module:
    """A random Llama of the bundled model's size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            tie_word_embeddings=True,
            max_position_embeddings=512,
        )
    )


def step_of(model: nn.Module, x: torch.Tensor, teacher: nn.Module | None, target: torch.Tensor | None) -> Callable:
    """A whole training step; `target`: logits made beforehand, so that the teacher's time is not in it."""
    optimizer = torch.optim.AdamW(parameter_groups(model, TrainConfig(steps=1)), weight_decay=0.0)

    def step() -> None:
        logits = model(input_ids=x, use_cache=False).logits
        wanted = target
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(input_ids=x, use_cache=False).logits
        distillation_loss(logits, wanted).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def steps(repeats: int) -> dict[str, float]:
    """Ratios `step` and `teacher` of the trained methods."""
    plain = small_llama()
    teacher = copy.deepcopy(plain).eval()
    x = torch.randint(0, 4096, (8, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        target = teacher(input_ids=x, use_cache=False).logits
    base = step_of(plain, x, None, target)
    found = {}
    for recipe in RECIPES:
        if f"step {recipe.name}" in BARS:
            model = copy.deepcopy(teacher).train()
            quantize(model, [x], recipe.quant)
            found[f"step {recipe.name}"] = ratio(step_of(model, x, None, target), base, repeats)
            found[f"teacher {recipe.name}"] = ratio(step_of(model, x, teacher, None), base, repeats)
    return found


def search(repeats: int) -> dict[str, float]:
    """Ratios `search` at 1024 x 1024."""
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(1024, 1024, generator=generator), torch.randn(4096, 1024, generator=generator)
    factor, scale = factorize(X.T @ X / len(X)), torch.ones(1024)
    found = {}
    for reach in (2, 3):
        book = Trellis(reach=reach).start_taps()
        found[f"search reach {reach}"] = ratio(
            lambda book=book: viterbi_round(W, scale, book, factor), lambda: W @ factor.H, min(repeats, 3)
        )
    return found


def books() -> dict[str, cb.AffineCodebook]:
    """The affine codebooks that are timed."""
    return {"scalar": cb.scalar(), "lattice": cb.lattice(4), "planes": normal_codebook("planes", 4, 0)}


def feedback(repeats: int) -> dict[str, float]:
    """Ratios `feedback` at 1024 x 1024."""
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(1024, 1024, generator=generator), torch.randn(4096, 1024, generator=generator)
    factor = factorize(X.T @ X / len(X))
    scale = row_scales(W, (0.9,))[0]
    return {
        f"feedback {name}": ratio(lambda book=book: ldlq_round(W, scale, book, factor), lambda: W @ factor.H, repeats)
        for name, book in books().items()
    }


def layer_of(name: str, size: int, estimator: str = "ste") -> AffineLinear:
    """A quantized layer of size x size on normal weights."""
    W = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    book, scale = books()[name], torch.ones(size)
    index, target = plain_round(W, scale, book)
    return AffineLinear(cb.CodedMatrix(book, index, scale), size, None, (None, None), target, estimator)


def affine(repeats: int, size: int = 512) -> dict[str, float]:
    """Ratios `affine`: a linear layer of size x size and 1024 tokens, forward and backward, with either weight."""
    x = torch.randn(1024, size, generator=torch.Generator().manual_seed(1))
    found = {}
    for name in ("lattice", "planes"):
        layer = layer_of(name, size)
        words, latent = layer.codebook().codewords(), nn.Parameter(torch.randn(size * size // 4, 4))

        def lookup(words=words, latent=latent) -> None:
            with torch.no_grad():
                nearest = words[(latent @ words.T - words.square().sum(1) / 2).argmax(1)]
            F.linear(x, (latent + (nearest - latent).detach()).view(size, size)).sum().backward()

        found[f"affine {name}"] = ratio(lambda layer=layer: layer(x).sum().backward(), lookup, repeats)
    return found


def saved_bytes(run: Callable) -> int:
    """Bytes of the distinct storages that autograd saves during `run`."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def saved(size: int = 1024) -> dict[str, float]:
    """`saved` for each affine codebook."""
    x = torch.randn(16, size)
    plain = nn.Linear(size, size, bias=False)
    base = saved_bytes(lambda: plain(x))
    found = {}
    for name in books():
        layer = layer_of(name, size)
        found[f"saved {name}"] = (saved_bytes(lambda layer=layer: layer(x)) - base) / (4 * size * size)
    return found


def missed(figures: dict[str, float]) -> list[str]:
    """What to say of each figure that is above its bar, and of each bar that has no figure."""
    said = [
        f"{what}: {figures[what]:.2f}, at most {bar:.2f}"
        for what, bar in BARS.items()
        if not figures.get(what, bar) <= bar
    ]
    return said + [f"{what}: not measured" for what in BARS if what not in figures]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=7)
    args = options.parse_args()
    torch.set_num_threads(1)
    rounding = feedback(args.repeats) | search(args.repeats)
    figures = rounding | affine(args.repeats) | saved() | steps(args.repeats)
    rows = [{"what": what, "ratio": value, "bar": BARS.get(what)} for what, value in figures.items()]
    for row in rows:
        print(f"{row['what']:<24}{row['ratio']:6.2f}" + (f"   at most {row['bar']:.2f}" if row["bar"] else ""))
    write_json(ROOT / "results" / "bench_cpu.json", {"meta": describe({"repeats": args.repeats}), "rows": rows})
    for line in (failures := missed(figures)):
        print(f"MISSED  {line}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
