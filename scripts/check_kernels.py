"""Compile the Triton kernels for real GPUs, without one, and read what the compiler made of it.

    python scripts/check_kernels.py                  all targets; writes results/kernels_aot.json
    python scripts/check_kernels.py --quick          one GPU, the batch-1 kernels, nothing written (a test runs it)

One line per kernel and target: registers, shared memory, spills, and instructions per weight of the inner loop, counted
in the machine code (SASS) by the disassembler that the triton package brings. A weight's share of a loop is

    instructions of the loop * threads / weights that the threads handle in one turn

Exit status 1 if a kernel does not compile, spills registers to memory, wants more shared memory than the GPU has, or
exceeds its bar of instructions. It says nothing of latency or occupancy; scripts/bench_kernels.py measures time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)  # the interpreter would take the place of the compiler
from lcqat_min.kernels import triton_kernels as kernels  # noqa: E402
from lcqat_min.kernels.triton_kernels import DECODE_BYTES, TILE_BYTES, TILE_ROWS  # noqa: E402

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}  # bytes that one program may have


@dataclass(frozen=True)
class Case:
    """One kernel with its constants. weights: that one turn of its loop handles; 0: no loop over weights."""

    name: str
    kernel: object
    pointers: dict[str, str]
    constants: dict[str, int]
    weights: int = 0
    bar: float | None = None


def cases(target: str, quick: bool) -> list[Case]:
    """The variants that product launches: columns of x (tokens * limbs), sizes of a vector."""
    numbers = dict.fromkeys(("x", "A", "b", "scale", "constant", "partial"), "*fp32")
    columns = (16,) if target.startswith("gfx") else (8,) if quick else (8, 16, 32)
    fused = [
        Case(
            f"fused, {count} columns",
            kernels.fused_kernel,
            numbers | {"digits": "*i8", "codes": "*i8"},
            {"COLUMNS": count, "ROWS": TILE_ROWS, "BYTES": TILE_BYTES},
            4 * TILE_ROWS * TILE_BYTES,
            4.5,
        )
        for count in columns
    ]
    words = {"codes": "*u8", "table": "*i64", "words": "*i64"}
    dequantize = Case("dequantize", kernels.dequantize_kernel, words, {"BYTES": DECODE_BYTES})
    wide = {"codes": "*u8", "tables": "*fp32", "end": "*fp32", "out": "*fp16"}
    sizes = {"WINDOW": 2, "W": 4, "BYTES": DECODE_BYTES // 4}
    windows = Case("dequantize windows", kernels.windows_kernel, wide, sizes)
    fold = [
        Case(
            f"fold d={d} of {m}, {limbs} limbs",
            kernels.fold_kernel,
            numbers | {"digits": "*i8"},
            {"D": d, "K": m, "LIMBS": limbs, "BYTES": TILE_BYTES},
        )
        for d, m in (((4, 8),) if quick else ((1, 1), (1, 2), (4, 8), (8, 16)))
        for limbs in ((2,) if quick else (2, 3))
    ]
    return [*fused, dequantize, windows, *fold]


def compile_case(case: Case, target: str):
    """The compiled kernel; pointers and row lengths are promised to be multiples of 16, as in any usual layer."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.pointers.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if name in (*case.pointers, "rows", "row_bytes", "inputs")]
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    return compile(source, target=gpu, options={"num_warps": 4, "num_stages": 3})


def measure(case: Case, target: str) -> dict:
    """One row of the result: what the compiler made of a case."""
    row = {"kernel": case.name, "target": target, "bar": case.bar if target == "sm_90" else None}
    try:
        compiled = compile_case(case, target)
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"}
    code = read_amd(compiled.asm["amdgcn"]) if target.startswith("gfx") else read_nvidia(compiled.asm["cubin"])
    threads = 4 * (64 if target.startswith("gfx") else 32)
    loop = code.pop("loop")
    return {
        **row,
        **code,
        "shared": compiled.metadata.shared,
        "instructions_per_weight": round(loop * threads / case.weights, 2) if case.weights else None,
    }


def read_nvidia(cubin: bytes) -> dict:
    """Registers, spill instructions and the length of the longest loop in a cubin."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(tools / "cuobjdump", "-res-usage", path)
        sass = run(tools / "nvdisasm", "-c", path)
    instructions = re.findall(r"^\s*(?:(\.L\w+):|/\*[0-9a-f]{4,}\*/\s+(.*?);)", sass, re.MULTILINE)
    spills = sum(bool(re.search(r"\b(STL|LDL)\b", text)) for _, text in instructions)
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    return {"registers": registers, "spills": spills, "loop": longest_loop(instructions, r"\bBRA\b.*?(\.L\w+)")}


def read_amd(assembly: str) -> dict:
    """The same from AMD assembly text."""
    number = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", assembly).group(1))  # noqa: E731
    instructions = re.findall(r"^(?:(\.L\w+):|\t([a-z]+_\S.*))", assembly, re.MULTILINE)
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "loop": longest_loop(instructions, r"\bs_c?branch\S*\s+(\.L\w+)"),
    }


def longest_loop(lines: list[tuple[str, str]], branch: str) -> int:
    """Instructions between a label and the branch back to it. lines: (label, "") or ("", instruction), in order."""
    labels: dict[str, int] = {}
    longest = count = 0
    for label, text in lines:
        if label:
            labels[label] = count
            continue
        count += 1
        jump = re.search(branch, text)
        if jump and jump.group(1) in labels:
            longest = max(longest, count - labels[jump.group(1)])
    return longest


def complaint(row: dict) -> str:
    """Why a row fails; empty if it does not."""
    if "error" in row:
        return row["error"]
    found = [f"{row['spills']} spills"] if row["spills"] else []
    found += [f"more than {SHARED[row['target']]} bytes shared"] if row["shared"] > SHARED[row["target"]] else []
    if row["bar"] and row["instructions_per_weight"] > row["bar"]:
        found.append(f"more than {row['bar']} instructions per weight")
    return ", ".join(found)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="sm_90 and batch 1 only; write no file")
    args = options.parse_args()
    rows = []
    print(f"{'kernel':<34}{'target':<8}{'registers':>10}{'shared':>8}{'spills':>7}  instructions per weight")
    for target in ("sm_90",) if args.quick else SHARED:
        for case in cases(target, args.quick):
            rows.append(row := measure(case, target))
            count = row.get("instructions_per_weight")
            print(
                f"{row['kernel']:<34}{target:<8}{row.get('registers', '-'):>10}{row.get('shared', '-'):>8}"
                f"{row.get('spills', '-'):>7}  {'' if count is None else count:<6}{complaint(row)}",
                flush=True,
            )
    if not args.quick:
        import triton

        from lcqat_min.harness.results import describe, write_json

        meta = describe({"triton": triton.__version__, "tile": [TILE_ROWS, TILE_BYTES], "warps": 4, "stages": 3})
        write_json(ROOT / "results" / "kernels_aot.json", {"meta": meta, "rows": rows})
    failed = sum(bool(complaint(row)) for row in rows)
    print(f"{len(rows)} kernels, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
