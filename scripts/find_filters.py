"""Find the taps that a linear trellis starts from: the best of several random starts, fitted to N(0, 1) weights.

    python scripts/find_filters.py 2/1/3                  2 bits for 1 weight, reach 3: prints taps and their error
    python scripts/find_filters.py 3/2/1 3/2/2 --starts 20

Each start alternates two steps, as k-means does: round by the Viterbi algorithm, solve for the taps by least squares.
The best is chosen on other weights, and its error is measured on yet others, in all columns except the last 32, whose
later bits are missing. What this prints is what lcqat_min/codebook/trellis_taps.py holds as TAPS; where a start ends
depends on the processor in its last digits only.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from lcqat_min.codebook.trellis import TrellisCodebook
from lcqat_min.ptq.viterbi import viterbi_round

ROWS, WIDTH, EDGE = 256, 256, 32
GO_ON = 3  # of the starts are fitted to all weights


def error_of(book: TrellisCodebook, x: Tensor) -> float:
    """Mean squared error on x [rows, n], except the last EDGE columns."""
    index, _ = viterbi_round(x, x.new_ones(len(x)), book, None)
    return (book.decode(index).flatten(1) - x)[:, :-EDGE].square().mean().item()


def fitted(book: TrellisCodebook, x: Tensor, rounds: int) -> TrellisCodebook:
    """`book` after `rounds` of rounding x [rows, n] and solving for the taps."""
    for _ in range(rounds):
        index, _ = viterbi_round(x, x.new_ones(len(x)), book, None)
        book = book.solved(x.view(-1, book.dim), index)
    return book


def found(bits: int, dim: int, reach: int, starts: int, rounds: int) -> tuple[float, TrellisCodebook]:
    """The best of `starts` random starts, and its error on fresh weights."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(3, ROWS, WIDTH - WIDTH % dim, generator=generator)
    x, choice, fresh = draws / draws.square().mean((1, 2), keepdim=True).sqrt()
    ended = []
    for start in range(starts):
        taps = torch.randn(reach + 1, dim, bits, generator=generator)
        taps *= 0.95 / taps.square().sum((0, 2), keepdim=True).sqrt()
        book = fitted(TrellisCodebook(taps), x[:64], rounds)
        ended.append((error_of(book, choice), book))
        print(f"  start {start}: {ended[-1][0]:.4f}", flush=True)
    best = [fitted(book, x, rounds) for _, book in sorted(ended, key=lambda pair: pair[0])[:GO_ON]]
    chosen = min(best, key=lambda book: error_of(book, choice))
    return error_of(chosen, fresh), chosen


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("codes", nargs="+", metavar="BITS/DIM/REACH")
    options.add_argument("--starts", type=int, default=10)
    options.add_argument("--rounds", type=int, default=15)
    args = options.parse_args()
    for code in args.codes:
        begin = time.perf_counter()
        error, book = found(*map(int, code.split("/")), args.starts, args.rounds)
        taps = [[[round(value, 4) for value in row] for row in tap] for tap in book.taps.tolist()]
        print(f"{code}: MSE {error:.5f}, {time.perf_counter() - begin:.0f} s\n{taps}", flush=True)


if __name__ == "__main__":
    main()
