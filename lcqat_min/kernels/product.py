"""D h with packed codes: who computes it, and what happens when the fastest way fails.

    product(h, codes, book, dtype)             D h for activations h [M, in] that are rotated and scaled already
    dequantize(codes, book, columns, dtype)    D itself, dense

                                few rows of h, affine codebook      many rows, or a table
    on a CPU                    decode.by_decoding or, for d = 3    decode.by_decoding
                                and d > 4, fold.by_signs
    on a CPU, compiled=True     fold.by_compiled_planes             decode.by_decoding
    within torch.compile        fold.by_planes                      decoded whole
    on a GPU                    triton_kernels.launch_fused         decoded whole by triton_kernels.launch_dequantize
    torch.jit.trace and
    torch.export, gradients     decoded whole                       decoded whole

The place of the tensors decides, whatever else the machine has. triton is imported when the first kernel is launched.
"Decoded whole" is a dense D and a dense product.

Fast ways may be missing: a compiler, a driver, a package. `attempt` then warns once and plain torch takes their place.
With LCQAT_STRICT=1 in the environment the failure is raised instead: tests run so, as a way that is replaced in silence
would pass them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..codebook.affine import AffineCodebook
from ..codebook.matrix import Codebook
from .decode import by_decoding, byte_table, decode
from .fold import by_compiled_planes, by_planes, by_signs

FEW_ROWS = 16  # of h. For more, the dense product costs more than decoding. On GPUs a prediction: nothing was timed yet


def product(h: Tensor, codes: Tensor, book: Codebook, dtype: torch.dtype, compiled: bool = False) -> Tensor:
    """D h: h fp32 [M, in], packed codes uint8 [out, bytes] (codebook/bitstring.py) -> fp32 [M, out].

    dtype: of the model's activations, which says how exact is exact enough on a GPU. compiled: on CPUs, few rows go
    through torch.compile. h gets its gradient (nothing else does), at the price of a dense weight for that call.
    ValueError where shapes or devices disagree.
    """
    _check(h, codes, book)
    whole = is_recorded() or (torch.is_grad_enabled() and h.requires_grad)
    planes = book.as_planes() if not whole and 0 < h.shape[0] <= FEW_ROWS else None
    compiling = torch.compiler.is_compiling()
    if planes is not None:
        if on_gpu(h):
            if (y := attempt(fused, h, codes, planes, dtype)) is not None:
                return y
        elif compiling:
            return by_planes(h, codes, planes)
        elif compiled and (y := attempt(by_compiled_planes, h, codes, planes)) is not None:
            return y
        elif 8 % book.bits:
            return by_signs(h, codes, planes)
    if whole or compiling or on_gpu(h):  # for a compiler, parts would be nodes of its graph by the thousand
        return _by_dense(h, codes, book, dtype)
    return by_decoding(h, codes, book)


def dequantize(codes: Tensor, book: Codebook, columns: int, dtype: torch.dtype) -> Tensor:
    """D: packed codes uint8 [rows, bytes] -> `dtype` [rows, columns]."""
    D = None
    if on_gpu(codes) and dtype != torch.float32 and 8 % book.bits == 0:
        D = attempt(looked_up, codes, byte_table(book).to(dtype), columns)
    return decode(codes, book, columns).to(dtype) if D is None else D


def on_gpu(x: Tensor) -> bool:
    """Whether kernels are to be tried."""
    return x.is_cuda and not is_recorded()


def is_recorded() -> bool:
    """Whether torch.jit.trace or torch.export writes a program down: for any number of rows, and any machine."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def fused(h: Tensor, codes: Tensor, planes: AffineCodebook, dtype: torch.dtype) -> Tensor:
    """D h for few rows by the fold and fused kernels."""
    from .triton_kernels import MOST_COLUMNS, launch_fused

    limbs = 3 if dtype == torch.float32 else 2
    return torch.cat([launch_fused(part, codes, planes, limbs) for part in h.split(MOST_COLUMNS // limbs)])


def looked_up(codes: Tensor, table: Tensor, columns: int) -> Tensor:
    """D by the dequantize kernel."""
    from .triton_kernels import launch_dequantize

    return launch_dequantize(codes, table, columns)


_failed: set[str] = set()  # names of what failed once and is not tried again


def attempt(way: Callable[..., Tensor], *arguments) -> Tensor | None:
    """way(*arguments); or None, with one warning, if it fails now or has failed before.

    Running out of GPU memory is never caught, and nothing is where LCQAT_STRICT=1.
    """
    strict = os.environ.get("LCQAT_STRICT") == "1"
    if way.__name__ in _failed and not strict:
        return None
    try:
        return way(*arguments)
    except Exception as error:
        if strict or isinstance(error, torch.OutOfMemoryError):
            raise
        _failed.add(way.__name__)
        remedy = " To avoid that: `pip install triton`." if isinstance(error, ImportError) else ""
        warnings.warn(
            f"{way.__name__} failed, so plain torch takes its place: the same result, but more slowly.{remedy} "
            f"Cause: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _by_dense(h: Tensor, codes: Tensor, book: Codebook, dtype: torch.dtype) -> Tensor:
    D = dequantize(codes, book, h.shape[1], dtype if on_gpu(h) else torch.float32)
    if D.dtype != torch.float16:
        return (h.to(D.dtype) @ D.T).float()
    # fp16 ends at 65504, and D h has no row scales yet: each row of h is multiplied in units of its largest number.
    unit = h.detach().abs().amax(1, keepdim=True).clamp(min=2.0**-100)
    return ((h / unit).half() @ D.T).float() * unit


def _check(h: Tensor, codes: Tensor, book: Codebook) -> None:
    row_bytes = -(-(-(-h.shape[1] // book.dim) * book.bits) // 8)
    if codes.dtype != torch.uint8 or codes.ndim != 2 or codes.shape[1] != row_bytes:
        raise ValueError(
            f"product: the packed codes are {codes.dtype} {list(codes.shape)}; {h.shape[1]} inputs in vectors of "
            f"{book.dim} at {book.bits} bits need uint8 [out, {row_bytes}]. Make them with pack_bits."
        )
    if not h.device == codes.device == book.device:
        raise ValueError(
            f"product: h is on {h.device}, the packed codes on {codes.device}, the codebook on {book.device}; "
            "move all to one device with .to()."
        )
