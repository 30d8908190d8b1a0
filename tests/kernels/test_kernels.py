"""The Triton kernels, in Triton's interpreter, and the torch paths, both against dense weights decoded by hand.

Checked: products and decoded weights for every codebook, ugly shapes, all 256 bytes, several blocks and splits;
the error of two and three limbs, also beside an outlier; equal bits twice; NaN stays visible; addresses beyond
2^31; rotation, scales and bias against the trained layer; gradients; who computes what, where, and what happens
without Triton or with a broken one; no whole dense weight on the CPU; the compiled kernels' machine code.
The interpreter has no bf16 arithmetic and cuts where a GPU rounds, so bf16 is compared within a step.
"""

import importlib.util
import os
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
from lcqat_min.kernels import decode as cpu
from lcqat_min.kernels import fold as folded
from lcqat_min.kernels import triton_kernels as kernels
from lcqat_min.layer.linear import AffineLinear
from lcqat_min.layer.rotation import random_signs
from lcqat_min.packing.layer import pack_bits
from lcqat_min.ptq.ldlq import Rounded

ROOT = Path(__file__).resolve().parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
in_interpreter = pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="watches Triton's interpreter")
SIZES = (1, 7, 16, 33, 130, 511)
AFFINE = ["scalar", *(f"{kind} {d}" for kind in ("lattice", "planes") for d in (1, 2, 3, 4, 8))]
WHOLE_BYTES = [name for name in AFFINE if name[-1] in "r124"] + ["table 1", "table 2", "table 4"]


def book_of(name: str) -> Codebook:
    """A codebook of random numbers, always the same for a name."""
    generator = torch.Generator().manual_seed(len(name))
    kind, d = (name.split() + ["1"])[:2]
    d = int(d)
    if kind == "scalar":
        return scalar(0.7)
    if kind == "table":
        return TableCodebook(torch.randn(4**d, d, generator=generator))
    A = torch.randn(d, d if kind == "lattice" else 2 * d, generator=generator)
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
    largest = book.table.abs().amax(0) if isinstance(book, TableCodebook) else 1.5 * book.A.abs().sum(1) + book.b.abs()
    return (x.double().abs() @ largest.double().repeat(x.shape[1])[: x.shape[1]])[:, None]


def fused(x: torch.Tensor, codes: torch.Tensor, book: Codebook, limbs: int) -> torch.Tensor:
    return kernels.launch_fused(x.to(DEVICE), codes.to(DEVICE), book.to(DEVICE), limbs).cpu()


# --- the fused product ---


@needs_triton
@settings(max_examples=15, phases=[Phase.explicit, Phase.generate])  # the interpreter is too slow to shrink in
@given(
    name=st.sampled_from(AFFINE),
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
        rows.append(book.codewords()[index].flatten() if book.bits <= 8 else book.decode(torch.tensor(index)).flatten())
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


# --- the decoded weight ---


@needs_triton
@pytest.mark.parametrize("name", WHOLE_BYTES)
@pytest.mark.parametrize("dtype, steps", [(torch.float16, 0), (torch.bfloat16, 1)])
def test_dequantize_kernel_decodes_every_byte_and_rounds_once(name, dtype, steps):
    book = book_of(name)
    codes = torch.stack([torch.arange(256), torch.arange(255, -1, -1), torch.full((256,), 255)]).to(torch.uint8)
    r, columns = torch.tensor([0.02, 1.0, 3.7]), 1021
    weight = kernels.launch_dequantize(codes.to(DEVICE), cpu.byte_table(book).to(DEVICE), r.to(DEVICE), columns, dtype)
    expected = (cpu_reference(codes, book, 1024)[:, :columns] * r[:, None]).to(dtype)
    apart = (weight.cpu().view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert weight.shape == (3, columns) and apart.max() <= steps


@needs_triton
@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 33), (33, 130), (2, 9001)])
def test_dequantize_kernel_cuts_padding_off(rows, columns):
    book = book_of("planes 4")
    codes, D = packed(book, rows, columns)
    r = torch.rand(rows, generator=torch.Generator().manual_seed(2)) + 0.5
    table = cpu.byte_table(book).to(DEVICE)
    weight = kernels.launch_dequantize(codes.to(DEVICE), table, r.to(DEVICE), columns, torch.float16)
    torch.testing.assert_close(weight.cpu(), (D * r[:, None]).half(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["lattice 3", "planes 4", "planes 8", "table 3"])
def test_dequantize_in_torch_serves_all_dtypes(name, dtype):
    book = book_of(name)
    codes, D = packed(book, 5, 33)
    r = torch.linspace(0.5, 2, 5)
    weight = kernels.dequantize(codes, book, r, 33, dtype)
    assert weight.dtype == dtype
    torch.testing.assert_close(weight.float(), D * r[:, None], rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_integer_inputs_are_refused_with_the_remedy():
    codes, _ = packed(scalar(), 4, 8)
    with pytest.raises(TypeError, match=r"x is torch.uint8. The model casts .*Method.skip"):
        kernels.packed_linear(torch.zeros(2, 8, dtype=torch.uint8), codes, scalar(), torch.ones(4))


@needs_triton
def test_kernels_take_views():
    book = book_of("planes 4")
    codes, D = packed(book, 40, 256)
    x, scale = torch.randn(2, 128, generator=torch.Generator().manual_seed(1)), torch.tensor(0.5).expand(40)
    view = codes[:, :32]  # the first 128 inputs
    assert relative(kernels.launch_fused(x.to(DEVICE), view.to(DEVICE), book, 3).cpu(), x @ D[:, :128].T) < 1e-5
    weight = kernels.launch_dequantize(
        view.to(DEVICE), cpu.byte_table(book).to(DEVICE), scale.to(DEVICE), 128, torch.float16
    )
    torch.testing.assert_close(weight.cpu(), (D[:, :128] * 0.5).half(), rtol=1e-3, atol=0)


def test_devices_that_disagree_are_named():
    codes, _ = packed(book_of("planes 4"), 8, 64)
    with pytest.raises(ValueError, match="codebook on meta; move all to one device"):
        kernels.packed_linear(torch.ones(1, 64), codes, book_of("planes 4").to("meta"), torch.ones(8))


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
    kernels._jit(kernels.fused_kernel)[1, 1](
        codes,
        digits,
        scale,
        constant,
        partial,
        rows,
        row_bytes,
        1,
        3,
        1,
        WIDTH=2,
        COLUMNS=8,
        ROWS=kernels.TILE_ROWS,
        BYTES=kernels.TILE_BYTES,
    )
    row = program * kernels.TILE_ROWS + np.arange(kernels.TILE_ROWS)
    assert row[0] * row_bytes > 2**31
    expected = codes.data_ptr() + row[:, None] * row_bytes + np.arange(kernels.TILE_BYTES)
    assert np.array_equal(np.sort(loads[0].astype(np.int64)), expected.ravel())
    written = partial.data_ptr() + 4 * (np.arange(3)[:, None] * rows + row)
    assert np.array_equal(np.sort(stores[0].astype(np.int64)), np.sort(written.ravel()))


@in_interpreter
def test_dequantize_kernel_counts_rows_in_64_bits(monkeypatch):
    loads, stores = watched(monkeypatch, row := 1 << 22)
    codes, table, scale = torch.zeros(1, dtype=torch.uint8), torch.zeros(1), torch.zeros(1)
    weight = torch.zeros(1, dtype=torch.float16)
    kernels._jit(kernels.dequantize_kernel)[1,](codes, table, scale, weight, 4095, 1024, BYTES=1024)
    assert row * 1024 > 2**31
    assert np.array_equal(loads[-1].astype(np.int64), codes.data_ptr() + row * 1024 + np.arange(1024))
    assert np.array_equal(stores[-1].astype(np.int64), weight.data_ptr() + 2 * (row * 4095 + np.arange(4095)))


# --- the torch path ---


def exact_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """torch._int_mm as processors that multiply bytes have it: sums of products of int8, exact in fp64."""
    out.copy_(torch.from_numpy(a.numpy().astype(np.float64) @ b.numpy().astype(np.float64)))


@pytest.fixture
def bytes_multiplied(monkeypatch):
    """Processors that lack the instruction run the same steps around it."""
    if not folded.multiplies_bytes():
        monkeypatch.setattr(torch, "_int_mm", exact_product)


EVERY = [
    *AFFINE,
    *(f"{kind} {d}" for kind in ("lattice", "planes") for d in (5, 6, 7)),
    *(f"table {d}" for d in (1, 2, 3, 4)),
]
NUMBERS = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


@pytest.fixture(params=[True, False], ids=["bytes", "no bytes"])
def processor(request, monkeypatch, bytes_multiplied):
    """With an instruction for products of bytes, and without; chunks so small that there are several."""
    monkeypatch.setattr(cpu, "multiplies_bytes", lambda: request.param)
    monkeypatch.setattr(cpu, "INTEGERS_PAY", 0)
    monkeypatch.setattr(cpu, "WORKSPACE", 4000)
    monkeypatch.setattr(folded, "DIGITS", 3000)
    monkeypatch.setattr(folded, "LOOKUPS", 300)
    monkeypatch.setattr(cpu, "_failed", set())
    yield
    assert not cpu._failed


@pytest.mark.parametrize("name", EVERY)
def test_torch_product_equals_the_dense_one(name, processor):
    book = book_of(name)
    for rows, columns, tokens in ((33, 130, 1), (7, 511, 5), (130, 33, 40), (1, 1, 1), (1, 9, 2), (3, 2, 0)):
        codes, D = packed(book, rows, columns)
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
        y = cpu.product(x, codes, book)
        assert y.shape == (tokens, rows)
        assert ((y - x.double() @ D.double().T).abs() <= 2e-6 * size(x, book)).all()
        torch.testing.assert_close(cpu.decode(codes, book, columns), D, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lattice 4", "planes 4", "planes 8"])
def test_who_multiplies_on_a_cpu(name, monkeypatch):
    """Integers for few rows and many codes where the processor has them, sums for one row elsewhere, or decoding."""
    asked = []
    for way in ("by_integers", "by_sums", "_by_decoding"):
        monkeypatch.setattr(cpu, way, lambda x, codes, book, way=way: asked.append(way) or x.new_zeros(len(x), 8))
    codes, _ = packed(book_of(name), 8, 64)
    for has_bytes, pays in ((True, codes.numel()), (True, codes.numel() + 1), (False, 0)):
        monkeypatch.setattr(cpu, "INTEGERS_PAY", pays)
        monkeypatch.setattr(cpu, "multiplies_bytes", lambda has_bytes=has_bytes: has_bytes)
        for tokens in (0, 1, cpu.FEW_ROWS, cpu.FEW_ROWS + 1):
            cpu.product(torch.ones(tokens, 64), codes, book_of(name))
    decoding = "_by_decoding"
    otherwise = [decoding, "by_sums", decoding, decoding]
    assert asked == [decoding, "by_integers", "by_integers", decoding, *otherwise, *otherwise]


@given(values=st.lists(NUMBERS, min_size=1, max_size=9), exponent=st.integers(-20, 0))
def test_integers_and_limbs_are_the_number_but_for_half_a_unit(values, exponent):
    x = torch.tensor([values, [value * 2.0**exponent for value in values]]).unsqueeze(2)  # [2, bytes, 1]
    whole, unit = folded.to_integers(x)
    error = (whole.double() * unit.double()[:, None, None] - x.double()).abs().amax((1, 2))
    assert (error <= unit.double() / 2).all()
    assert (error <= 2.0**-30 * x.abs().amax((1, 2)).double() + 2.0**-119).all()
    limbs = folded.to_limbs(whole)
    assert limbs.dtype == torch.int8 and limbs.shape == (len(values), 8)
    again = limbs.double().view(-1, 2, 4) @ 256.0 ** torch.arange(4, dtype=torch.float64)
    assert again.equal(whole[:, :, 0].T.double())


def test_integers_add_up_exactly_at_their_largest(bytes_multiplied):
    """One limb of every part is 127 in size and all signs agree: the sum of a row is 0.99 times 2^31."""
    x = (-127 * 256.0 * 4.0 ** torch.arange(3, -1, -1)).repeat(folded.MOST_BYTES)
    x[3] = 2.0**30 - 64
    codes = torch.full((2, folded.MOST_BYTES), 255, dtype=torch.uint8)
    y = folded.by_integers(x[None], codes, AffineCodebook(torch.eye(1), torch.zeros(1), 4))
    assert ((y.double() - 1.5 * x.double().sum()).abs() <= 1.5e-6 * x.double().abs().sum()).all()


def test_rows_longer_than_32_bits_can_sum_are_decoded(monkeypatch):
    asked = []
    for way in ("by_integers", "_by_decoding"):
        monkeypatch.setattr(cpu, way, lambda x, codes, book, way=way: asked.append(way) or x.new_zeros(len(x), 1))
    monkeypatch.setattr(cpu, "multiplies_bytes", lambda: True)
    monkeypatch.setattr(cpu, "INTEGERS_PAY", 0)
    for row_bytes in (folded.MOST_BYTES, folded.MOST_BYTES + 1):
        cpu.product(torch.ones(2, 4 * row_bytes), torch.zeros(1, row_bytes, dtype=torch.uint8), book_of("planes 4"))
    assert asked == ["by_integers", "_by_decoding"]


@pytest.mark.parametrize("setting, value", [("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"), ("ATEN_CPU_CAPABILITY", "avx2")])
def test_processors_without_the_instruction_are_found_out(setting, value):
    program = "from lcqat_min.kernels.fold import multiplies_bytes; print(multiplies_bytes())"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, setting: value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("tokens", [1, 3])
def test_another_default_dtype_leaves_nothing_behind(tokens, processor):
    book, (codes, D) = book_of("planes 4"), packed(book_of("planes 4"), 9, 64)
    x = torch.ones(tokens, 64)
    for constant in (folded._factors, folded._offsets, folded._centred_bytes, folded._limb_units):
        constant.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        first = cpu.product(x, codes, book)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(first, cpu.product(x, codes, book)) and relative(first, x @ D.T) < 1e-5


def test_integers_beside_an_outlier(bytes_multiplied):
    """What an outlier takes from its neighbours stays below what fp32 sums lose to it."""
    book = book_of("planes 4")
    codes, D = packed(book, 64, 512)
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(1))
    x[0, 100] = 3000.0
    error = (folded.by_integers(x, codes, book) - x.double() @ D.double().T).abs()
    assert (error <= 1e-6 * size(x, book)).all() and error[1].max() < 2e-4  # the other row has a scale of its own


@pytest.mark.parametrize("way, most", [("by_integers", 5e-7), ("by_sums", 5e-7), ("by_planes", 5e-5)])
@pytest.mark.parametrize("name", ["scalar", "lattice 4", "planes 4", "planes 8"])
def test_inputs_that_are_not_centred_cost_no_digits(name, way, most, bytes_multiplied):
    """Digits from 0 to L - 1 make large sums of large inputs, and a constant as large to take off: only for planes."""
    book = book_of(name)
    codes, D = packed(book, 64, 4096)
    x = 1 + 0.1 * torch.randn(1, 4096, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ D.double().T
    dense = relative(x @ D.T, expected)
    assert relative(getattr(folded, way)(x, codes, book), expected) < max(2 * dense, most)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_integers_show_what_is_not_finite_in_its_row_only(bad, bytes_multiplied):
    codes, _ = packed(book_of("lattice 4"), 9, 64)
    x = torch.ones(2, 64)
    x[1, 5] = bad
    y = folded.by_integers(x, codes, book_of("lattice 4"))
    assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_fake_tensors_ask_no_processor(monkeypatch):
    """Programs are traced with tensors that have no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(cpu, "INTEGERS_PAY", 0)
    for constant in (folded.multiplies_bytes, folded._factors, folded._offsets, folded._centred_bytes):
        constant.cache_clear()
    with FakeTensorMode():
        x, codes = torch.zeros(1, 64), torch.zeros(8, 16, dtype=torch.uint8)
        assert cpu.product(x, codes, AffineCodebook(torch.zeros(4, 8), torch.zeros(4), 2)).shape == (1, 8)


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor made inside."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("has_bytes", [True, False])
@pytest.mark.parametrize("name", ["lattice 4", "planes 4", "planes 8", "table 4"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_no_dense_weight_on_the_cpu(name, tokens, has_bytes, monkeypatch, bytes_multiplied):
    monkeypatch.setattr(cpu, "multiplies_bytes", lambda: has_bytes)
    monkeypatch.setattr(cpu, "INTEGERS_PAY", 0)
    monkeypatch.setattr(cpu, "WORKSPACE", limit := 1 << 17)
    monkeypatch.setattr(folded, "DIGITS", limit)
    monkeypatch.setattr(folded, "LOOKUPS", limit // 4)
    book = book_of(name)
    codes, _ = packed(book, 1024, 256)  # the dense weight has 2^20 bytes, the codes 2^16, 2^16 sums of bytes 2^16
    with Largest() as largest:
        cpu.product(torch.ones(tokens, 256), codes, book)
    digits = 2 if name == "planes 8" else 1  # decoded from two-level digits, two a weight
    assert 0 < largest.bytes <= digits * limit * (cpu.MANY_ROWS_FACTOR if tokens > 16 else 1)


def test_compiled_path_is_the_same_sum(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    folded._compiled.cache_clear()
    for name in ("lattice 4", "planes 4"):
        codes, D = packed(book_of(name), 33, 130)
        for rows in (1, 2):
            x = torch.randn(rows, 130, generator=torch.Generator().manual_seed(1))
            assert relative(cpu.product(x, codes, book_of(name), compiled=True), x @ D.T) < 1e-5
    folded._compiled.cache_clear()


def test_a_graph_of_a_whole_model_is_short():
    """torch.compile of a model unrolls Python's loops: over chunks of rows they would make graphs of thousands."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, book = CompileCounterWithBackend("eager"), book_of("planes 4")
    codes, D = packed(book, 4096, 1024)
    x = torch.randn(1, 1024, generator=torch.Generator().manual_seed(1))
    y = torch.compile(lambda x: cpu.product(x, codes, book), backend=counter)(x)
    assert relative(y, x @ D.T) < 1e-5
    assert sum(len(graph.graph.nodes) for graph in counter.graphs) < 100


def test_compiler_that_fails_is_named_once_and_replaced(monkeypatch):
    def no_compiler(function, **options):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(cpu, "_failed", set())
    folded._compiled.cache_clear()
    codes, D = packed(book_of("planes 4"), 33, 130)
    x = torch.ones(1, 130)
    with pytest.warns(RuntimeWarning, match="no C[+][+] compiler found"):
        first = cpu.product(x, codes, book_of("planes 4"), compiled=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = cpu.product(x, codes, book_of("planes 4"), compiled=True)
    assert torch.equal(first, again) and relative(first, x @ D.T) < 1e-5


# --- packed_linear ---


def trained_layer(rows: int, columns: int, book: AffineCodebook, rotated: bool) -> AffineLinear:
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(0, 1 << book.bits, (rows, -(-columns // book.dim)), generator=generator)
    scale = torch.rand(rows, generator=generator) + 0.5
    rounded = Rounded(book, index, scale, book.decode(index).flatten(1), torch.zeros(rows))
    signs = [random_signs(n, generator) if rotated else None for n in (columns, rows)]
    layer = AffineLinear(columns, rows, rounded, torch.randn(rows, generator=generator), *signs, "ste", True, False)
    layer.col_scale.data.uniform_(0.5, 2, generator=generator)
    return layer.requires_grad_(False)


def arguments_of(layer: AffineLinear) -> tuple:
    book = layer.codebook()
    return (
        pack_bits(layer.indices(), book.bits),
        book,
        layer.row_scale,
        layer.bias,
        layer.col_scale,
        layer.signs_in,
        layer.signs_out,
    )


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=in_interpreter)])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 7, 96), (3, 11, 96), (0, 96)])
def test_packed_linear_equals_the_trained_layer(rotated, on_gpu, shape, monkeypatch):
    """Below and above the number of rows where the product stops being fused; 14 rows of fp32 go in two parts."""
    monkeypatch.setattr(kernels, "on_gpu", lambda x: on_gpu)
    monkeypatch.setattr(cpu, "_failed", set())
    layer = trained_layer(40, 96, book_of("planes 4"), rotated)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = kernels.packed_linear(x, *arguments_of(layer))
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=in_interpreter)])
@pytest.mark.parametrize("name", ["lattice 3", "planes 4", "planes 8", "table 2"])
def test_a_traced_product_serves_other_inputs_and_numbers_of_rows(name, on_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "on_gpu", lambda x: on_gpu)
    book, generator = book_of(name), torch.Generator().manual_seed(1)
    codes, D = packed(book, 33, 130)
    for rows in (1, 20):
        x = torch.randn(rows, 130, generator=generator)
        traced = torch.jit.trace(lambda x: kernels.packed_linear(x, codes, book, torch.ones(33)), x, check_trace=False)
        for other in (1, 5, 20):
            x = torch.randn(other, 130, generator=generator)
            assert relative(traced(x), x @ D.T) < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=in_interpreter)])
def test_packed_linear_keeps_the_dtype_of_x(dtype, tolerance, on_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "on_gpu", lambda x: on_gpu)
    layer = trained_layer(40, 96, book_of("lattice 4"), True)
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):  # must not reach the arithmetic inside
        y = kernels.packed_linear(x, *arguments_of(layer))
    assert y.dtype == dtype and relative(y, layer(x.float())) < tolerance


@pytest.mark.parametrize("on_gpu", [False, True])
def test_packed_linear_passes_the_gradient_to_x(on_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "on_gpu", lambda x: on_gpu)
    layer = trained_layer(40, 96, book_of("planes 4"), True)
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (ours,) = torch.autograd.grad(kernels.packed_linear(x, *arguments_of(layer)).square().sum(), x)
    (theirs,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_named():
    codes, _ = packed(book_of("planes 4"), 8, 64)
    r, book = torch.ones(8), book_of("planes 4")
    with pytest.raises(ValueError, match=r"66 inputs .* want uint8 \[out, 17\]"):
        kernels.packed_linear(torch.ones(1, 66), codes, book, r)
    with pytest.raises(ValueError, match=r"torch.int64"):
        kernels.packed_linear(torch.ones(1, 64), codes.long(), book, r)
    with pytest.raises(ValueError, match=r"row_scale has shape \[7\]; want \[8\]"):
        kernels.packed_linear(torch.ones(1, 64), codes, book, r[:7])
    with pytest.raises(ValueError, match="x on meta, codes on cpu"):
        kernels.packed_linear(torch.ones(1, 64, device="meta"), codes, book, r)


# --- who computes, and what happens when that fails ---


def test_cpu_tensors_never_reach_triton(monkeypatch):
    def forbidden(kernel):
        raise AssertionError("a CPU tensor was sent to a kernel")

    monkeypatch.setattr(kernels, "_jit", forbidden)
    codes, D = packed(book_of("planes 4"), 8, 64)
    for tokens in (1, 40):
        y = kernels.packed_linear(torch.ones(tokens, 64), codes, book_of("planes 4"), torch.ones(8))
        assert relative(y, torch.ones(tokens, 64) @ D.T) < 1e-5


@pytest.mark.parametrize("tokens, kernel", [(1, "launch_fused"), (40, "launch_dequantize")])
def test_kernel_that_fails_is_named_once_and_replaced(tokens, kernel, monkeypatch):
    def broken(kernel):
        raise RuntimeError("PTX of the future")

    monkeypatch.setattr(kernels, "_jit", broken)
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    monkeypatch.setattr(cpu, "_failed", set())
    codes, D = packed(book_of("planes 4"), 8, 64)
    x = torch.ones(tokens, 64).half()
    with pytest.warns(RuntimeWarning, match="PTX of the future") as caught:
        first = kernels.packed_linear(x, codes, book_of("planes 4"), torch.ones(8))
    assert kernel in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = kernels.packed_linear(x, codes, book_of("planes 4"), torch.ones(8))
    assert torch.equal(first, again) and relative(first, x.float() @ D.T) < 1e-2


def test_lack_of_memory_is_not_hidden(monkeypatch):
    def full(kernel):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(kernels, "_jit", full)
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    codes, _ = packed(book_of("planes 4"), 8, 64)
    with pytest.raises(torch.OutOfMemoryError):
        kernels.packed_linear(torch.ones(1, 64), codes, book_of("planes 4"), torch.ones(8))


WITHOUT_TRITON = """
import sys, warnings
import torch
from lcqat_min.kernels import decode as cpu
from lcqat_min.kernels import fold as folded
from lcqat_min.kernels import triton_kernels as kernels
from lcqat_min.codebook import scalar
assert "triton" not in sys.modules, "importing the kernels imported triton"
assert not torch.cuda.is_initialized(), "importing the kernels touched a driver"
sys.modules["triton"] = None  # as if it were not installed
codes, x, r = torch.full((2, 4), 255, dtype=torch.uint8), torch.ones(1, 16), torch.ones(2)
assert kernels.packed_linear(x, codes, scalar(), r).tolist() == [[24.0, 24.0]]
kernels.on_gpu = lambda x: True
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert kernels.packed_linear(x, codes, scalar(), r).tolist() == [[24.0, 24.0]]
message, = [str(w.message) for w in caught]
assert "launch_fused" in message and "pip install triton" in message, message
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
