"""The Triton kernels, in Triton's interpreter, and the torch paths, both against dense weights decoded by hand.

Checked: products and decoded weights for every codebook, ugly shapes, all 256 bytes, several blocks and splits;
the error of two and three limbs, also beside an outlier; equal bits twice; NaN stays visible; addresses beyond
2^31; who computes what, where; gradients and traced programs; what happens without Triton or with a broken one;
no whole dense weight on the CPU; the compiled kernels' machine code.
"""

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lcqat_min.codebook import AffineCodebook, Codebook, TableCodebook, scalar
from lcqat_min.codebook.bitstring import pack_bits
from lcqat_min.codebook.trellis import TrellisCodebook
from lcqat_min.kernels import decode as decoding
from lcqat_min.kernels import fold as folding
from lcqat_min.kernels import product as products
from lcqat_min.kernels.decode import byte_tables, decode, row_end
from lcqat_min.kernels.product import dequantize, product

ROOT = Path(__file__).resolve().parents[2]
FP32 = torch.float32
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from lcqat_min.kernels import triton_kernels as kernels
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
in_interpreter = pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="watches Triton's interpreter")
SIZES = (1, 7, 16, 33, 130, 511)
AFFINE = ["scalar", *(f"{kind} {d}" for kind in ("lattice", "planes") for d in (1, 2, 3, 4, 8))]
AFFINE += [f"planes {d} of {m}" for d, m in ((4, 4), (4, 6), (2, 5), (4, 12), (1, 3))]  # other rates: m bits for d
TRELLIS = [
    f"trellis {d} of {m}, reach {L}" for d, m, L in ((1, 2, 3), (1, 2, 0), (2, 3, 2), (1, 1, 6), (1, 4, 1), (2, 5, 1))
]
FOLDED = [*AFFINE, *TRELLIS]
WHOLE_BYTES = [name for name in AFFINE if name[-1] in "r124" and "of" not in name] + ["table 1", "table 2", "table 4"]


def book_of(name: str) -> Codebook:
    """A codebook of random numbers, always the same for a name."""
    generator = torch.Generator().manual_seed(len(name))
    kind, *numbers = re.findall(r"\w+", name.replace("of", "").replace("reach", ""))
    d, m, reach = (*map(int, numbers), *(1, 0, 0)[len(numbers) :])
    if kind == "scalar":
        return scalar(0.7)
    if kind == "table":
        return TableCodebook(torch.randn(4**d, d, generator=generator))
    if kind == "trellis":
        return TrellisCodebook(torch.randn(reach + 1, d, m, generator=generator))
    A = torch.randn(d, m or (d if kind == "lattice" else 2 * d), generator=generator)
    return AffineCodebook(A, torch.randn(d, generator=generator), 4 if kind == "lattice" else 2)


def packed(book: Codebook, rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes uint8 [rows, bytes] and what they stand for, fp32 [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 1 << book.bits, (rows, -(-columns // book.dim)), generator=generator)
    return pack_bits(index, book.bits), book.decode(index).flatten(1)[:, :columns]


def relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.cpu().double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def size(x: torch.Tensor, book: Codebook) -> torch.Tensor:
    """What the error of a row of x is measured against, as sums may cancel: largest y possible, fp64 [tokens, 1]."""
    if isinstance(book, TrellisCodebook):
        largest = book.taps.abs().sum((0, 2))
    else:
        largest = (
            book.table.abs().amax(0) if isinstance(book, TableCodebook) else 1.5 * book.A.abs().sum(1) + book.b.abs()
        )
    return (x.double().abs() @ largest.double().repeat(x.shape[1])[: x.shape[1]])[:, None]


def fused(x: torch.Tensor, codes: torch.Tensor, book: Codebook, limbs: int) -> torch.Tensor:
    h, planes = book.linear_form(x)
    return kernels.launch_fused(h.to(DEVICE), codes.to(DEVICE), planes.to(DEVICE), limbs).cpu()


# --- the fused product ---


@needs_triton
@settings(max_examples=15, phases=[Phase.explicit, Phase.generate])  # the interpreter is too slow to shrink in
@given(
    name=st.sampled_from(FOLDED),
    rows=st.sampled_from(SIZES),
    columns=st.sampled_from(SIZES),
    tokens=st.integers(1, 17),
    limbs=st.sampled_from((2, 3)),
)
def test_fused_product_equals_the_dense_one(name, rows, columns, tokens, limbs):
    book = book_of(name)
    codes, D = packed(book, rows, columns)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    y = fused(x, codes, book, limbs)
    assert y.shape == (tokens, rows)
    tolerance = {2: 3e-4, 3: 4e-6}[limbs]
    assert ((y - x.double() @ D.double().T).abs() <= tolerance * size(x, book)).all()


@needs_triton
@pytest.mark.parametrize("name", AFFINE)
def test_fused_product_knows_every_digit_of_every_byte(name):
    """One row for each byte value, and x that is 1 at one input and 0 elsewhere: the columns of D come out."""
    book = book_of(name)
    row_bytes = 3 * 8 * book.bits // 8 // 2
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, row_bytes).contiguous()
    columns = 8 * row_bytes // book.bits * book.dim
    x = torch.eye(columns)[:: max(1, columns // 8)]
    assert relative(fused(x, codes, book, 3), x @ cpu_reference(codes, book, columns).T) < 1e-6


def cpu_reference(codes: torch.Tensor, book: Codebook, columns: int) -> torch.Tensor:
    """Decoded digit by digit, in Python's own integers."""
    rows = []
    for row in codes.tolist():
        number, length = int.from_bytes(bytes(row), "big"), 8 * len(row)
        index = [number >> (length - book.bits * (v + 1)) & ((1 << book.bits) - 1) for v in range(columns // book.dim)]
        listed = book.bits <= 8 and not isinstance(book, TrellisCodebook)
        rows.append(book.codewords()[index].flatten() if listed else book.decode(torch.tensor(index)).flatten())
    return torch.stack(rows)


@needs_triton
def test_blocks_and_splits_add_up_and_repeat_bit_by_bit(monkeypatch):
    book = book_of("planes 4")
    codes, D = packed(book, 70, 1100)  # 275 bytes: three blocks, the last one not full; two tiles of rows
    x = torch.randn(2, 1100, generator=torch.Generator().manual_seed(1))
    together = fused(x, codes, book, 3)
    assert torch.equal(together, fused(x, codes, book, 3))
    monkeypatch.setattr(kernels, "PROGRAMS", 1)  # one split that loops over all blocks, instead of one a block
    assert relative(fused(x, codes, book, 3), together) < 1e-6
    assert relative(together, x.double() @ D.double().T) < 1e-6


@needs_triton
@pytest.mark.parametrize("limbs, tolerance", [(2, 2e-3), (3, 1e-5)])
def test_outlier_costs_no_more_than_its_own_rounding(limbs, tolerance):
    book = book_of("planes 4")
    codes, D = packed(book, 64, 512)
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    x[0, 100] = 1000.0
    assert relative(fused(x, codes, book, limbs), x.double() @ D.double().T) < tolerance


@needs_triton
@pytest.mark.filterwarnings("ignore:(invalid value encountered|All-NaN slice):RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible_in_its_row_alone(value):
    book = book_of("planes 4")
    codes, _ = packed(book, 16, 64)
    x = torch.ones(3, 64)
    x[1, 5] = value
    finite = fused(x, codes, book, 2).isfinite()
    assert finite.all(1).tolist() == [True, False, True] and not finite[1].any()


@needs_triton
def test_zero_gives_zero():
    codes, _ = packed(book_of("planes 4"), 16, 64)
    assert not fused(torch.zeros(1, 64), codes, book_of("planes 4"), 2).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["lattice 3", "planes 4", "planes 8", "table 3"])
def test_weights_are_decoded_to_any_dtype(name, dtype):
    """Whole vectors in a byte are rounded once; sums over bytes, each time."""
    book = book_of(name)
    codes, D = packed(book, 5, 33)
    weight = decode(codes, book, 33, dtype)
    assert weight.dtype == dtype and weight.shape == (5, 33)
    if name in WHOLE_BYTES:
        assert torch.equal(weight, D.to(dtype))
    largest = 2 * size(torch.eye(33), book).float().T
    assert ((weight.float() - D).abs() <= 2 * torch.finfo(dtype).eps * largest).all()


def looked_up(codes: torch.Tensor, book: Codebook, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return kernels.launch_dequantize(codes.to(DEVICE), byte_tables(book)[0].to(dtype).to(DEVICE), columns).cpu()


@needs_triton
@pytest.mark.parametrize("name", WHOLE_BYTES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantize_kernel_decodes_every_byte_and_rounds_once(name, dtype):
    book = book_of(name)
    codes = torch.stack([torch.arange(256), torch.arange(255, -1, -1), torch.full((256,), 255)]).to(torch.uint8)
    weight = looked_up(codes, book, 1021, dtype)
    assert weight.dtype == dtype
    torch.testing.assert_close(weight, cpu_reference(codes, book, 1024)[:, :1021].to(dtype), rtol=0, atol=0)


@needs_triton
@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 33), (33, 130), (2, 9001)])
def test_dequantize_kernel_cuts_padding_off(rows, columns):
    codes, D = packed(book_of("planes 4"), rows, columns)
    assert torch.equal(looked_up(codes, book_of("planes 4"), columns, torch.float16), D.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["lattice 3", "planes 4", "planes 8", "table 3"])
def test_dequantize_in_torch_serves_all_dtypes(name, dtype):
    book = book_of(name)
    codes, D = packed(book, 5, 33)
    weight = dequantize(codes, book, 33, dtype)
    assert weight.dtype == dtype
    torch.testing.assert_close(weight.float(), D, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["planes 4 of 4", *(name for name in TRELLIS if "of 3" not in name and "of 5" not in name)]
)
@pytest.mark.parametrize("rows, columns", [(3, 1021), (7, 33), (2, 2), (2, 9001)])
def test_windows_that_cross_bytes_are_decoded_by_a_kernel(name, rows, columns, dtype):
    book = book_of(name)
    codes, D = packed(book, rows, columns)
    tables, end = (x.to(DEVICE) for x in (torch.stack(byte_tables(book)), row_end(book, columns)))
    weight = kernels.launch_windows(codes.to(DEVICE), tables, end, columns, dtype).cpu()
    assert weight.dtype == dtype
    largest = size(torch.eye(columns)[:1], book).float().max() * 4
    assert (weight.float() - D).abs().max() <= torch.finfo(dtype).eps * largest


@needs_triton
def test_the_dequantize_kernel_takes_views():
    codes, D = packed(book_of("planes 4"), 40, 256)
    assert torch.equal(looked_up(codes[:, :32], book_of("planes 4"), 128, torch.float16), D[:, :128].half())


@needs_triton
def test_the_fused_kernel_takes_views():
    book = book_of("planes 4")
    codes, D = packed(book, 40, 256)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    view = codes[:, :32]  # the first 128 inputs
    assert relative(fused(x, view, book, 3), x @ D[:, :128].T) < 1e-5


# --- offsets: what is read and written, when the programs are those of a huge weight ---


def watched(monkeypatch, program: int) -> tuple[list, list]:
    """Let kernels run as program number `program` + their own; record addresses instead of touching memory."""
    from triton.runtime import interpreter

    loads, stores = [], []

    def load(pointers, mask, other, dtype):
        loads.append(pointers[mask])
        return np.zeros(pointers.shape, dtype)

    monkeypatch.setattr(
        interpreter,
        "_interpreter",
        SimpleNamespace(load=load, store=lambda pointers, value, mask: stores.append(pointers[mask])),
    )
    original = interpreter.interpreter_builder.create_get_program_id

    def shifted(axis: int):
        handle = original(axis)
        handle.data = handle.data + np.int32(program if axis == 0 else 0)
        return handle

    monkeypatch.setattr(interpreter.interpreter_builder, "create_get_program_id", shifted)
    return loads, stores


@in_interpreter
def test_fused_kernel_counts_rows_in_64_bits(monkeypatch):
    loads, stores = watched(monkeypatch, program := 1 << 20)
    rows, row_bytes = (program + 1) * kernels.TILE_ROWS, 4096
    codes, digits = torch.zeros(1, dtype=torch.int8), torch.zeros(1, dtype=torch.int8)
    scale, constant, partial = torch.zeros(3, 1).unbind()
    sizes = {"COLUMNS": 8, "ROWS": kernels.TILE_ROWS, "BYTES": kernels.TILE_BYTES}
    kernels.fused_kernel[1, 1](codes, digits, scale, constant, partial, rows, row_bytes, 1, 3, 1, **sizes)
    row = program * kernels.TILE_ROWS + np.arange(kernels.TILE_ROWS)
    assert row[0] * row_bytes > 2**31
    expected = codes.data_ptr() + row[:, None] * row_bytes + np.arange(kernels.TILE_BYTES)
    assert np.array_equal(np.sort(loads[0].astype(np.int64)), expected.ravel())
    written = partial.data_ptr() + 4 * (np.arange(3)[:, None] * rows + row)
    assert np.array_equal(np.sort(stores[0].astype(np.int64)), np.sort(written.ravel()))


@in_interpreter
def test_dequantize_kernel_counts_bytes_in_64_bits(monkeypatch):
    loads, stores = watched(monkeypatch, program := 1 << 22)
    codes, table, words = torch.zeros(1, dtype=torch.uint8), *torch.zeros(2, 1, dtype=torch.int64)
    kernels.dequantize_kernel[1,](codes, table, words, (program + 1) * 1024, 1024)
    assert program * 1024 > 2**31
    assert np.array_equal(loads[0].astype(np.int64), codes.data_ptr() + program * 1024 + np.arange(1024))
    assert np.array_equal(stores[-1].astype(np.int64), words.data_ptr() + 8 * (program * 1024 + np.arange(1024)))


# --- the torch path ---


EVERY = [
    *FOLDED,
    *(f"{kind} {d}" for kind in ("lattice", "planes") for d in (5, 6, 7)),
    *(f"table {d}" for d in (1, 2, 3, 4)),
]


def few_parts(monkeypatch) -> None:
    """Small matrices are decoded in several parts."""
    monkeypatch.setattr(decoding, "WORKSPACE", 4000)


@pytest.mark.parametrize("name", EVERY)
def test_torch_product_equals_the_dense_one(name, monkeypatch):
    few_parts(monkeypatch)
    book = book_of(name)
    for rows, columns, tokens in ((33, 130, 1), (7, 511, 5), (130, 33, 40), (1, 1, 1), (1, 9, 2), (3, 2, 0)):
        codes, D = packed(book, rows, columns)
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
        expected, tolerance = x.double() @ D.double().T, 2e-6 * size(x, book)
        ways = [product(x, codes, book, FP32), decoding.by_decoding(x, codes, book)]
        if form := book.linear_form(x):
            ways.append(folding.by_planes(form[0], codes, form[1]))
        for y in ways:
            assert y.shape == (tokens, rows) and ((y - expected).abs() <= tolerance).all()
        torch.testing.assert_close(decode(codes, book, columns), D, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FOLDED)
def test_both_ways_know_every_bit_of_every_byte(name):
    book = book_of(name)
    row_bytes = 3 * book.bits if "trellis" in name else 3 * book.bits // 2  # whole vectors
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, row_bytes).contiguous()
    columns = 8 * row_bytes // book.bits * book.dim
    expected = cpu_reference(codes, book, columns)
    assert relative(decode(codes, book, columns), expected) < 1e-6
    x, planes = book.linear_form(torch.eye(columns))
    assert relative(folding.by_planes(x, codes, planes).T, expected) < 1e-6


def test_byte_tables_hold_what_every_byte_adds():
    assert byte_tables(scalar())[0][0b00011011].tolist() == [-1.5, -0.5, 0.5, 1.5]
    table = TableCodebook(torch.randn(256, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(byte_tables(table)[0], table.codewords())
    upper, lower = byte_tables(book := book_of("planes 8"))  # an index of 16 bits: two bytes
    torch.testing.assert_close((upper[:, None] + lower).flatten(0, 1), book.codewords(), rtol=1e-5, atol=1e-5)
    assert [len(byte_tables(book_of(name))) for name in ("planes 3", "lattice 5", "table 3")] == [3, 5, 0]


@pytest.mark.parametrize("name", ["lattice 4", "planes 8", "trellis 1 of 2, reach 3", "table 4"])
def test_who_multiplies(name, monkeypatch):
    asked, codes = [], packed(book_of(name), 8, 64)[0]
    monkeypatch.setattr(products, "by_decoding", lambda *_: asked.append("decoded"))
    monkeypatch.setattr(products, "by_planes", lambda *options: asked.append(f"planes {options[3:]}"))
    monkeypatch.setattr(products, "decode", lambda *_: asked.append("dense") or torch.zeros(8, 64))
    gpu = SimpleNamespace(launch_fused=lambda *_: asked.append("fused"))
    monkeypatch.setattr(products, "working_kernels", lambda device: gpu)

    def ways(compiled: bool = False) -> list[str]:
        asked.clear()
        for tokens in (0, 1, products.FEW_ROWS["cpu"], products.FEW_ROWS["cpu"] + 1):
            product(torch.ones(tokens, 64), codes, book_of(name), FP32, compiled)
        assert asked[0] == asked[3] and asked[1] == asked[2]
        return asked[:2]

    affine = name != "table 4"
    assert ways() == ["decoded", "decoded"]
    assert ways(compiled=True) == ["decoded", "planes (True,)" if affine else "decoded"]
    monkeypatch.setattr(products, "on_gpu", lambda x: True)
    assert ways() == ways(compiled=True) == ["dense", "fused" if affine else "dense"]
    monkeypatch.setattr(products, "working_kernels", lambda device: None)
    assert ways() == ["dense", "dense"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert ways() == ["dense", "planes (False,)" if affine else "dense"]
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert ways() == ["dense", "dense"]


@pytest.mark.parametrize("name", ["planes 4", "planes 8", "table 3"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_another_default_dtype_changes_nothing(tokens, name):
    book, (codes, D) = book_of(name), packed(book_of(name), 9, 64)
    x = torch.ones(tokens, 64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        first = product(x, codes, book, FP32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(first, product(x, codes, book, FP32)) and relative(first, x @ D.T) < 1e-5


@pytest.mark.parametrize("name", ["scalar", "lattice 4", "planes 4", "planes 8"])
def test_inputs_that_are_not_centred_cost_no_digits(name):
    """Digits from 0 to L - 1 would make large sums of large inputs; those of -1 and +1 do not."""
    book = book_of(name)
    codes, D = packed(book, 64, 4096)
    x = 1 + 0.1 * torch.randn(1, 4096, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ D.double().T
    dense = relative(x @ D.T, expected)
    assert relative(folding.by_planes(x, codes, book.as_planes()), expected) < max(2 * dense, 5e-7)


@pytest.mark.parametrize("name", ["planes 4", "planes 8", "table 4"])
def test_fake_tensors_pass(name):
    """Programs are traced with tensors that have no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        book = book_of(name)
        codes = torch.zeros(8, 16, dtype=torch.uint8)
        for tokens in (1, 20):
            assert product(torch.zeros(tokens, 64), codes, book, FP32).shape == (tokens, 8)


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor made inside."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("name", ["lattice 4", "planes 4", "planes 8", "table 4"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_no_dense_weight_on_the_cpu(name, tokens, monkeypatch):
    monkeypatch.setattr(decoding, "WORKSPACE", limit := 1 << 17)
    book = book_of(name)
    codes, _ = packed(book, 1024, 256)  # the dense weight has 2^20 bytes
    with Largest() as largest:
        product(torch.ones(tokens, 256), codes, book, FP32)
    answer = 4 * 1024 * tokens
    assert 0 < largest.bytes <= max(answer, limit)


@pytest.mark.parametrize("name", ["lattice 4", "planes 4", "planes 8"])
def test_compiled_path_is_the_same_sum(name, monkeypatch):
    monkeypatch.setattr(folding, "_compiled", lambda function: function)
    codes, D = packed(book_of(name), 33, 130)
    for rows in (1, 2):
        x = torch.randn(rows, 130, generator=torch.Generator().manual_seed(1))
        assert relative(product(x, codes, book_of(name), FP32, compiled=True), x @ D.T) < 1e-5


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", ["planes 4", "table 4"])
def test_a_graph_of_a_whole_model_is_short(name, tokens):
    """torch.compile of a model unrolls Python's loops: over parts of the rows they would make graphs of thousands."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, book = CompileCounterWithBackend("eager"), book_of(name)
    codes, D = packed(book, 16384, 1024)
    x = torch.randn(tokens, 1024, generator=torch.Generator().manual_seed(1))
    y = torch.compile(lambda x: product(x, codes, book, FP32), backend=counter)(x)
    assert relative(y, x @ D.T) < 1e-5
    assert 0 < sum(len(graph.graph.nodes) for graph in counter.graphs) < 100


def test_a_missing_compiler_is_an_error(monkeypatch):
    def no_compiler(function):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(folding, "_compiled", no_compiler)
    codes, _ = packed(book_of("planes 4"), 33, 130)
    with pytest.raises(RuntimeError, match="no C[+][+] compiler found"):
        product(torch.ones(1, 130), codes, book_of("planes 4"), FP32, compiled=True)


# --- one product for all: dtypes, gradients, traced programs ---


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=in_interpreter)])
@pytest.mark.parametrize("tokens", [0, 1, 14, 33])
def test_product_is_the_dense_one_wherever_it_is_made(dtype, tolerance, on_gpu, tokens, monkeypatch):
    """Below and above the number of rows where the product stops being fused; 14 rows of fp32 go in two parts."""
    monkeypatch.setattr(products, "on_gpu", lambda x: on_gpu)
    for name in ("lattice 4", "planes 8", "table 4"):
        codes, D = packed(book_of(name), 40, 96)
        h = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1))
        y = product(h, codes, book_of(name), dtype)
        assert y.dtype == FP32 and y.shape == (tokens, 40)
        assert relative(y, h @ D.T) < (tolerance if on_gpu else 1e-5)


def test_half_precision_does_not_overflow(monkeypatch):
    """Sums of activations without row scales pass 65504, the largest number of fp16; rows of zeros stay zeros."""
    monkeypatch.setattr(products, "on_gpu", lambda x: True)
    book = book_of("planes 4")
    codes, D = packed(book, 40, 96)
    h = 1e5 * torch.randn(20, 96, generator=torch.Generator().manual_seed(1))
    h[3] = 0
    y = product(h, codes, book, torch.float16)
    assert relative(y, h @ D.T) < 2e-3 and not y[3].any()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["lattice 3", "planes 4", "planes 8", "table 2"])
def test_a_traced_product_serves_other_inputs_and_numbers_of_rows(name):
    book, generator = book_of(name), torch.Generator().manual_seed(1)
    codes, D = packed(book, 33, 130)
    for rows in (1, 20):
        x = torch.randn(rows, 130, generator=generator)
        traced = torch.jit.trace(lambda x: product(x, codes, book, FP32), x, check_trace=False)
        for other in (1, 5, 20):
            x = torch.randn(other, 130, generator=generator)
            assert relative(traced(x), x @ D.T) < 1e-5


@pytest.mark.parametrize("name", ["planes 4", "planes 8", "table 4"])
def test_an_exported_product_serves_other_numbers_of_rows(name):
    class Product(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return product(x, codes, book, FP32)

    book, rows = book_of(name), torch.export.Dim("rows", min=2)
    codes, D = packed(book, 33, 130)
    x = torch.randn(40, 130, generator=torch.Generator().manual_seed(1))
    program = torch.export.export(Product(), (x[:3],), dynamic_shapes=({0: rows},)).module()
    for other in (2, 40):
        assert relative(program(x[:other]), x[:other] @ D.T) < 1e-5


@pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=in_interpreter)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_product_passes_the_gradient_to_h(on_gpu, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(products, "on_gpu", lambda x: on_gpu)
    codes, D = packed(book_of("planes 4"), 40, 96)
    h = torch.randn(2, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = product(h, codes, book_of("planes 4"), dtype)
    weights = torch.randn(2, 40, generator=torch.Generator().manual_seed(2))
    (ours,) = torch.autograd.grad((y * weights).sum(), h)
    assert relative(ours, weights @ D) < (tolerance if on_gpu else 1e-5)


def test_bad_arguments_are_named():
    codes, _ = packed(book_of("planes 4"), 8, 64)
    book = book_of("planes 4")
    with pytest.raises(ValueError, match=r"66 inputs need uint8 \[out, 17\]"):
        product(torch.ones(1, 66), codes, book, FP32)
    with pytest.raises(ValueError, match=r"torch.int64"):
        product(torch.ones(1, 64), codes.long(), book, FP32)


# --- what happens when a kernel fails ---


@needs_triton
@pytest.mark.parametrize("fault", ["raises", "computes something else"])
def test_kernels_that_do_not_work_are_named_once_and_replaced(fault, monkeypatch):
    def broken(h, codes, planes, limbs):
        if fault == "raises":
            raise RuntimeError("PTX of the future")
        return decoding.by_decoding(h, codes, planes) * 1.01

    monkeypatch.setattr(kernels, "launch_fused", broken)
    monkeypatch.setattr(products, "on_gpu", lambda x: True)
    products.working_kernels.cache_clear()
    codes, D = packed(book_of("planes 4"), 8, 64)
    x = torch.ones(1, 64)
    reason = "PTX of the future" if fault == "raises" else "Tensor-likes are not close"
    with pytest.warns(RuntimeWarning, match=f"slower torch works on cpu.*{reason}"):
        first = product(x, codes, book_of("planes 4"), torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = product(x, codes, book_of("planes 4"), torch.float16)
    products.working_kernels.cache_clear()
    assert torch.equal(first, again) and relative(first, x @ D.T) < 1e-2


@in_interpreter
def test_the_kernels_work_here():
    products.working_kernels.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert products.working_kernels(torch.device(DEVICE)) is kernels


WITHOUT_TRITON = """
import sys, warnings
import torch
from lcqat_min.codebook import scalar
from lcqat_min.kernels import decode, fold, product
sys.modules.setdefault("triton", None)  # as if it were not installed
assert sys.modules["triton"] is None, "importing the room imported triton"
assert not torch.cuda.is_initialized(), "importing the room touched a driver"
arguments = torch.ones(1, 16), torch.full((2, 4), 255, dtype=torch.uint8), scalar(), torch.float32
assert product.product(*arguments).tolist() == [[24.0, 24.0]]
product.on_gpu = lambda x: True
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert product.product(*arguments).tolist() == [[24.0, 24.0]]
message, = [str(w.message) for w in caught]
assert "slower torch works on" in message and "pip install triton" in message, message
"""


def test_import_touches_nothing_and_triton_may_be_missing():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, cwd=ROOT)


# --- the machine code ---


@needs_triton
def test_kernels_compile_for_a_gpu_within_their_bars():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "scripts/check_kernels.py", "--quick"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("sm_90") == 4 and "0 failed" in result.stdout


def test_checker_of_machine_code_counts_loops_and_complains():
    spec = importlib.util.spec_from_file_location("check_kernels", ROOT / "scripts" / "check_kernels.py")
    check = importlib.util.module_from_spec(spec)
    sys.modules["check_kernels"] = check  # dataclasses look their module up
    spec.loader.exec_module(check)
    lines = [
        ("", "MOV"),
        (".L_1", ""),
        ("", "LOP3"),
        (".L_2", ""),
        ("", "IMMA"),
        ("", "@P0 BRA `(.L_2)"),
        ("", "@P1 BRA `(.L_1)"),
        ("", "BRA `(.L_3)"),
        (".L_3", ""),
        ("", "EXIT"),
    ]
    assert check.longest_loop(lines, r"\bBRA\b.*?(\.L\w+)") == 4
    good = {"target": "sm_90", "spills": 0, "shared": 1024, "bar": 3.5, "instructions_per_weight": 3.5}
    assert check.complaint(good) == ""
    assert check.complaint({**good, "spills": 2}) == "2 spills"
    assert "more than 3.5" in check.complaint({**good, "instructions_per_weight": 3.6})
    assert "bytes shared" in check.complaint({**good, "shared": 1 << 20})
    assert check.complaint({**good, "error": "no"}) == "no"
