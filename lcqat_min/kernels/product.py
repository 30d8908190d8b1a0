"""D h with packed codes: who computes it.

    product(h, codes, book, dtype)      D h for activations h [M, in] that are rotated and scaled already

                                few rows of h, affine codebook      many rows, or a table
    on a CPU                    decode.by_decoding                  decode.by_decoding
    on a CPU, compiled=True     fold.by_planes, compiled            decode.by_decoding
    within torch.compile        fold.by_planes                      decoded whole
    on a GPU                    triton_kernels.launch_fused         decoded whole, by launch_dequantize in 16 bits
    torch.jit.trace and
    torch.export, gradients     decoded whole                       decoded whole

The place of the tensors decides, whatever else the machine has. "Decoded whole" is a dense D and a dense product.

triton is imported when the first product on a GPU is to be made. A package, a driver or a compiler may be missing. So
the kernels first have to make a small product on that GPU as plain torch makes it; where they do not, a warning says
why, and their place is taken by plain torch. With LCQAT_STRICT=1 in the environment the failure is raised instead:
tests run so, as a way that is replaced would pass them.

Limits: the first product on a GPU tries the kernels, so it cannot be recorded in a CUDA graph; make one before.
"""

import os
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..codebook.affine import frame_planes
from ..codebook.matrix import Codebook
from .decode import by_decoding, byte_tables, decode, row_end
from .fold import by_planes

# Rows of h for which each bit of the codes is multiplied. For more, decoding costs less. On GPUs a prediction: nothing
# was timed yet.
FEW_ROWS = {"cpu": 4, "cuda": 16}


def product(h: Tensor, codes: Tensor, book: Codebook, dtype: torch.dtype, compiled: bool = False) -> Tensor:
    """D h: h fp32 [M, in], packed codes uint8 [out, bytes] (codebook/bitstring.py) -> fp32 [M, out].

    dtype: of the model's activations, which says how exact is exact enough on a GPU. compiled: on CPUs, few rows go
    through torch.compile, which needs a C++ compiler. h gets its gradient (nothing else does), at the price of a dense
    weight for that call. ValueError where the codes do not have the shape that h and the codebook ask for.
    """
    row_bytes = -(-(-(-h.shape[1] // book.dim) * book.bits) // 8)
    if codes.dtype != torch.uint8 or codes.shape[1:] != (row_bytes,):
        needed = f"{h.shape[1]} inputs need uint8 [out, {row_bytes}], as pack_bits makes them"
        raise ValueError(f"product: the packed codes are {codes.dtype} {list(codes.shape)}; {needed}")
    # What is recorded is for any number of rows, and any machine.
    compiling, recorded = torch.compiler.is_compiling(), torch.jit.is_tracing() or torch.compiler.is_exporting()
    dense = recorded or (torch.is_grad_enabled() and h.requires_grad)
    form = book.linear_form(h) if not dense and 0 < h.shape[0] <= FEW_ROWS.get(h.device.type, 4) else None
    if form and (compiling or (compiled and not on_gpu(h))):
        return by_planes(form[0], codes, form[1], not compiling)
    if form and on_gpu(h) and (kernels := working_kernels(h.device)):
        return kernels.launch_fused(form[0], codes, form[1], 2 if dtype.itemsize == 2 else 3)
    if not (dense or compiling or on_gpu(h)):  # for a compiler, parts would be nodes of its graph by the thousand
        return by_decoding(h, codes, book)
    dtype = dtype if on_gpu(h) and dtype.itemsize == 2 and not recorded else torch.float32
    unit = h.detach().abs().amax(1, keepdim=True).clamp(min=2.0**-100)  # fp16 ends at 65504, and D lacks row scales
    return ((h / unit).to(dtype) @ dequantize(codes, book, h.shape[1], dtype).T).float() * unit


def dequantize(codes: Tensor, book: Codebook, columns: int, dtype: torch.dtype) -> Tensor:
    """D: packed codes uint8 [rows, bytes] -> `dtype` [rows, columns]; on GPUs by a kernel, if it is of 16 bits."""
    if on_gpu(codes) and dtype.itemsize == 2 and 8 % book.bits == 0 and (kernels := working_kernels(codes.device)):
        tables, end = byte_tables(book), row_end(book, columns)
        if len(tables) == 1 and tables[0].shape[1] == 4:
            return kernels.launch_dequantize(codes, tables[0].to(dtype), columns)
        return kernels.launch_windows(codes, torch.stack(tables), end, columns, dtype)
    return decode(codes, book, columns, dtype)


def on_gpu(x: Tensor) -> bool:
    """Whether kernels are to be tried."""
    return x.is_cuda


@cache
def working_kernels(device: torch.device) -> ModuleType | None:
    """kernels/triton_kernels.py, if a small product on `device` is that of plain torch; else None, with a warning."""
    try:
        from . import triton_kernels

        codes, planes = torch.arange(256, dtype=torch.uint8).view(8, 32), frame_planes()
        h = torch.linspace(-1, 1, 256, dtype=torch.float32).view(2, 128)
        y = triton_kernels.launch_fused(h.to(device), codes.to(device), planes.to(device), 3).cpu()
        torch.testing.assert_close(y, by_decoding(h, codes, planes), rtol=1e-4, atol=1e-4)
        return triton_kernels
    except Exception as error:
        if os.environ.get("LCQAT_STRICT") == "1":
            raise
        warnings.warn(f"slower torch works on {device}; does `pip install triton` help? {error!r}", RuntimeWarning, 3)
        return None
