"""Time products with packed weights: against the dense product on a GPU, or with --cpu on one thread of a CPU.

    python scripts/bench_kernels.py          on a CUDA device; writes results/kernels_gpu.json, figures/kernels.svg
    python scripts/bench_kernels.py --cpu    writes results/packed_cpu.json

On a GPU each time is the median over replays of a CUDA graph of calls. Consecutive calls use different copies of the
weight, together more than twice the second-level cache, or a small weight would be read from there. In each row:

    bf16          torch.matmul with the dense bf16 weight
    fused         packed codes times activations: the fold and the fused kernel and the sum over splits (launch_fused)
    decoded       the dequantize kernel, then torch.matmul
    packed        as a model calls it: kernels.product with rotations and scales around whichever way it chose
    error         of fused against fp64 on the decoded weight, relative: the first run on a new GPU is a test as well
    copy          decoded bytes per second over those of a plain copy in this run (codes read and weight written)

Rows where the packed product loses are kept. On a CPU the ratio is CPU time of one thread (time.process_time) over
that of F.linear with dense fp32 weights, in turns, median; without rotations and scales. Here, too, consecutive calls
use different weights, as the layers of a model do: all packed ones, then all dense ones. "generation" is CPU time of
the packed bundled model over that of the dense one, for NEW_TOKENS tokens with a cache.

Every affine codebook is multiplied as planes, so tied planes and scalar grids take the time of untied planes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from lcqat_min.codebook import Codebook, TableCodebook, random_planes  # noqa: E402
from lcqat_min.harness.results import describe, write_json  # noqa: E402
from lcqat_min.kernels.decode import byte_tables, decode  # noqa: E402
from lcqat_min.kernels.product import FEW_ROWS, dequantize, product, working_kernels  # noqa: E402
from lcqat_min.layer.rotation import random_signs, rotate, unrotate  # noqa: E402
from lcqat_min.ptq.trellis import Trellis  # noqa: E402

SHAPES = [(n, n) for n in (2048, 4096, 8192, 16384)] + [(4096, 11008), (11008, 4096), (8192, 28672)]  # [out, in]
BATCHES = (1, 4, 16, 64)
LAYERS, NEW_TOKENS = 8, 64  # of the whole model on a GPU: Llama-2-7B's layers, fewer of them; tokens generated
CPU_CODES = 8 << 20  # bytes of codes of all layers together: more than a second-level cache
os.environ["LCQAT_STRICT"] = "1"  # a way that fails must not be timed as another


def books() -> dict[str, Codebook]:
    """Random codebooks of each form; times do not depend on the numbers in them."""
    generator = torch.Generator().manual_seed(0)
    return {
        "planes d=4": random_planes(4, generator),
        "planes d=8": random_planes(8, generator),
        "trellis": Trellis().start_taps(),
        "table d=4": TableCodebook(torch.randn(256, 4, generator=generator)),
    }


def random_codes(rows: int, columns: int, device: str = "cpu") -> Tensor:
    return torch.randint(0, 256, (rows, columns // 4), dtype=torch.uint8, device=device)


# --- GPU ---


def seconds(calls: list[Callable[[], Tensor]], replays: int = 20) -> float:
    """Median time of one of `calls`, from replays of a CUDA graph that makes each once."""
    for call in calls[:2]:
        call()  # compiles and allocates outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]  # kept, so that each writes to a place of its own  # noqa: F841
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(times)


def copies(bytes_each: int) -> int:
    """How many copies of a weight are more than twice the second-level cache."""
    return 2 * torch.cuda.get_device_properties(0).L2_cache_size // bytes_each + 2


def copy_speed() -> float:
    """Bytes per second, read and written, of copying 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([lambda: target.copy_(source)])


def bench_dequantize(rows: int, columns: int, copy: float) -> dict:
    weights = [random_codes(rows, columns, "cuda") for _ in range(copies(rows * columns // 4))]
    table = byte_tables(books()["table d=4"].to("cuda"))[0].bfloat16()
    took = seconds(
        [partial(working_kernels(codes.device).launch_dequantize, codes, table, columns) for codes in weights]
    )
    return {
        "what": "dequantize",
        "out": rows,
        "in": columns,
        "us": 1e6 * took,
        "copy": rows * columns * 2.25 / took / copy,
    }


def bench_product(rows: int, columns: int, batch: int, name: str, book: Codebook) -> dict:
    """One row: the same product four ways, in microseconds, and the error of the fused one."""
    book = book.to("cuda")
    x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
    weights = [random_codes(rows, columns, "cuda") for _ in range(copies(rows * columns // 4))]
    D = decode(weights[0], book, columns)
    row = {"what": "product", "codebook": name, "out": rows, "in": columns, "batch": batch}
    if not isinstance(book, TableCodebook):
        parts, expected = x.float().split(FEW_ROWS["cuda"]), x.double() @ D.double().T
        y = all_fused(parts, weights[0], book)
        row["error"] = ((y - expected).norm() / expected.norm()).item()
        row["fused"] = 1e6 * seconds([partial(all_fused, parts, codes, book) for codes in weights])
    row["decoded"] = 1e6 * seconds([partial(decoded, x, codes, book) for codes in weights])
    row["packed"] = 1e6 * seconds([partial(Packed(codes, columns, book), x) for codes in weights])
    dense = [D.bfloat16() for _ in range(min(len(weights), copies(2 * rows * columns)))]
    row["bf16"] = 1e6 * seconds([partial(torch.matmul, x, W.T) for W in dense])
    return row


def all_fused(parts: tuple[Tensor, ...], codes: Tensor, book: Codebook) -> Tensor:
    forms = [book.linear_form(part) for part in parts]  # the fold of a trellis is a part of its product
    return torch.cat([working_kernels(h.device).launch_fused(h, codes, planes, 2) for h, planes in forms])


def decoded(x: Tensor, codes: Tensor, book: Codebook) -> Tensor:
    return x @ dequantize(codes, book, x.shape[1], x.dtype).T


class Packed(nn.Module):
    """A linear layer of given codes, rotated on both sides, as packing/layer.py computes it."""

    def __init__(self, codes: Tensor, columns: int, book: Codebook):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.codes, self.book = codes, book.to(codes.device)
        self.scale = torch.full((len(codes),), 0.02, device=codes.device)
        self.s_in, self.s_out = (random_signs(n, generator).to(codes.device) for n in (columns, len(codes)))

    def forward(self, x: Tensor) -> Tensor:
        h = rotate(x.reshape(-1, x.shape[-1]).float(), self.s_in)
        y = unrotate(product(h, self.codes, self.book, x.dtype) * self.scale, self.s_out)
        return y.to(x.dtype).reshape(*x.shape[:-1], len(self.codes))


@torch.inference_mode()
def bench_model(name: str, book: Codebook | None) -> dict:
    """Tokens per second of greedy decoding, batch 1, eager, with a cache: what a user sees, launches included."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=LAYERS, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16().eval()
    for parent in list(model.model.modules()) if book is not None else ():
        for child, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                out, inputs = layer.weight.shape
                setattr(parent, child, Packed(random_codes(out, inputs, "cuda"), inputs, book))
    torch.cuda.empty_cache()
    prompt = torch.ones(1, 16, dtype=torch.long, device="cuda")
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    took = []
    for _ in range(4):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        model.generate(prompt, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, **settings)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - begun)
    return {
        "what": "model",
        "codebook": name,
        "layers": LAYERS,
        "tokens_per_second": NEW_TOKENS / min(took[1:]),
        "gigabytes": torch.cuda.memory_allocated() / 1e9,
    }


def on_gpu() -> int:
    if not torch.cuda.is_available():
        print(
            "No CUDA device here: nothing was measured and nothing written. Without one, the kernels can be\n"
            "compiled and counted by scripts/check_kernels.py, and products on the CPU measured with --cpu.",
            file=sys.stderr,
        )
        return 2
    import triton

    copy = copy_speed()
    rows = [{"what": "copy", "bytes_per_second": copy}]
    for shape in SHAPES:
        rows.append(bench_dequantize(*shape, copy))
        print(rows[-1], flush=True)
        for name, book in books().items():
            for batch in BATCHES:
                rows.append(bench_product(*shape, batch, name, book))
                print(rows[-1], flush=True)
    for name, book in {"bf16": None, **books()}.items():
        rows.append(bench_model(name, book))
        print(rows[-1], flush=True)
    device = torch.cuda.get_device_properties(0)
    meta = describe(
        {
            "device": device.name,
            "sm": f"{device.major}.{device.minor}",
            "l2_bytes": device.L2_cache_size,
            "triton": triton.__version__,
        }
    )
    write_json(ROOT / "results" / "kernels_gpu.json", {"meta": meta, "rows": rows})
    plot(rows, device.name)
    wrong = [row for row in rows if row.get("error", 0) > 1e-2]
    print(f"{len(rows)} rows, {len(wrong)} with a wrong product")
    return int(bool(wrong))


def plot(rows: list[dict], device: str) -> None:
    """Speed over bf16 by batch, one panel per shape, one line per codebook; the line at 1 is bf16 itself."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, -(-len(SHAPES) // 2), figsize=(12, 6), sharex=True, sharey=True)
    for ax, (out, inputs) in zip(axes.flat, SHAPES, strict=False):
        for name in books():
            for way, style in (("fused", "o-"), ("decoded", "x:")):
                points = [
                    (row["batch"], row["bf16"] / row[way])
                    for row in rows
                    if way in row and (row["codebook"], row["out"], row["in"]) == (name, out, inputs)
                ]
                if points:
                    ax.plot(*zip(*points, strict=True), style, label=f"{name}, {way}")
        ax.axhline(1, color="grey", linewidth=0.8)
        ax.set(title=f"{out} x {inputs}", xscale="log", yscale="log", xlabel="rows of x", ylabel="speed over bf16")
    axes.flat[0].legend(fontsize=6)
    figure.suptitle(f"Products with 2-bit weights on {device}")
    figure.tight_layout()
    figure.savefig(ROOT / "figures" / "kernels.svg", metadata={"Date": None})


# --- CPU ---


def cpu_ratio(calls: list[Callable[[], Tensor]], dense: list[Callable[[], Tensor]], repeats: int) -> float:
    """Median CPU time of all `calls` over that of all `dense`, run in turns; each is warmed up once."""
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for way, took in zip((dense, calls), times, strict=True):
            begun = time.process_time()
            for call in way:
                call()
            took.append(time.process_time() - begun)
    return statistics.median(times[1][1:]) / statistics.median(times[0][1:])


def bench_generation(repeats: int) -> float:
    """CPU time of NEW_TOKENS tokens of the packed bundled model, rounded in a hurry, over that of the dense one."""
    from lcqat_min import LCQAT, quantize
    from lcqat_min.harness.models import BUNDLED, load
    from lcqat_min.packing.convert import pack_layers

    (dense, _), (packed, _) = load(BUNDLED), load(BUNDLED)
    tokens = torch.randint(0, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
    quantize(packed, [tokens], LCQAT(refits=0))
    for name, layer in pack_layers(packed).items():
        packed.set_submodule(name, layer)
    prompt = tokens[:1, :16]
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    settings |= {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    return cpu_ratio(
        [partial(packed.generate, prompt, **settings)], [partial(dense.generate, prompt, **settings)], repeats
    )


def on_cpu(repeats: int, ways: list[str]) -> int:
    torch.set_num_threads(1)
    batches = {"eager": (1, 4, 16, 256), "compiled": (1, 4)}
    cases = [(way, batch) for way in ways for batch in batches[way]]
    rows = []
    for out, inputs in ((2048, 2048), (11008, 4096)):
        count = max(2, CPU_CODES // (out * inputs // 4))
        weights = [torch.randn(out, inputs) for _ in range(count)]
        codes = [random_codes(out, inputs) for _ in range(count)]
        for name, book in books().items():
            for way, batch in cases:
                if way == "compiled" and isinstance(book, TableCodebook):
                    continue  # nothing to fold, nothing to compile
                x = torch.randn(batch, inputs)
                ratio = cpu_ratio(
                    [partial(product, x, part, book, torch.float32, way == "compiled") for part in codes],
                    [partial(F.linear, x, W) for W in weights],
                    max(3, repeats // (1 + batch // 16)),
                )
                row = {"out": out, "in": inputs, "codebook": name, "way": way, "batch": batch, "ratio": round(ratio, 3)}
                print(f"{out:>6} x {inputs:<6}{name:<14}{way:<10}{batch:>4} rows of x{ratio:8.2f}", flush=True)
                rows.append(row)
    generation = round(bench_generation(repeats), 3)
    print(f"generating {NEW_TOKENS} tokens with the packed bundled model{generation:8.2f}")
    meta = describe({"repeats": repeats, "new_tokens": NEW_TOKENS})
    write_json(ROOT / "results" / "packed_cpu.json", {"meta": meta, "generation": generation, "rows": rows})
    return 0


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cpu", action="store_true", help="measure the torch path on one thread")
    options.add_argument("--repeats", type=int, default=15, help="of each CPU figure at batch 1; fewer above")
    options.add_argument(
        "--ways",
        nargs="+",
        default=["eager", "compiled"],
        choices=["eager", "compiled"],
        help="CPU paths; `compiled` needs a C++ compiler and takes about a minute more",
    )
    args = options.parse_args()
    return on_cpu(args.repeats, args.ways) if args.cpu else on_gpu()


if __name__ == "__main__":
    sys.exit(main())
