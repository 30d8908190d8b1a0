"""The packed layer against the layer in training: values, shapes, dtypes, gradients, and what it refuses."""

import warnings

import pytest
import torch

from lcqat_min.codebook import CodedMatrix, frame_planes, lattice
from lcqat_min.kernels import product as products
from lcqat_min.layer.linear import AffineLinear
from lcqat_min.layer.rotation import random_signs
from lcqat_min.packing import PackedLinear, pack_layers


def layer_of(book, rotated: bool) -> tuple[AffineLinear, PackedLinear]:
    """A layer of 96 inputs and 40 outputs with random codes, scales and bias, in training and packed."""
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(0, 1 << book.bits, (40, 96 // book.dim), generator=generator)
    scale = (torch.rand(40, generator=generator) + 0.5).half().float()
    signs = [random_signs(n, generator) if rotated else None for n in (96, 40)]
    bias = torch.randn(40, generator=generator)
    layer = AffineLinear(CodedMatrix(book, index, scale), 96, bias, signs)
    with torch.no_grad():
        layer.col_scale.uniform_(0.5, 2, generator=generator)
        for number in (layer.col_scale, layer.A, layer.b):
            number.copy_(number.half())
    return layer.requires_grad_(False), pack_layers(layer)[""]


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 7, 96), (3, 11, 96), (0, 96)])
@pytest.mark.parametrize("book", [lattice(4), frame_planes()], ids=["lattice", "planes"])
def test_packed_linear_equals_the_trained_layer(book, rotated, shape):
    layer, packed = layer_of(book, rotated)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = packed(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_packed_linear_keeps_the_dtype_of_x(dtype, tolerance):
    layer, packed = layer_of(lattice(4), True)
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):  # must not reach the arithmetic inside
        y = packed(x)
    expected = layer(x.float())
    assert y.dtype == dtype and (y.float() - expected).norm() < tolerance * expected.norm()
    assert torch.equal(y, packed(x))


def test_the_model_s_dtype_and_the_option_reach_the_product(monkeypatch):
    asked = []

    def product(h, codes, book, dtype, compiled):
        asked.append((h.dtype, h.shape, dtype, compiled))
        return h.new_zeros(len(h), len(codes))

    monkeypatch.setattr("lcqat_min.packing.layer.product", product)
    monkeypatch.setattr(PackedLinear, "compiled", True)
    layer_of(lattice(4), True)[1](torch.ones(2, 3, 96, dtype=torch.float16))
    assert asked == [(torch.float32, (6, 96), torch.float16, True)]


def test_packed_linear_passes_the_gradient_to_x():
    layer, packed = layer_of(frame_planes(), True)
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (ours,) = torch.autograd.grad(packed(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_packed_linear_is_compiled_in_one_graph(backend):
    layer, packed = layer_of(frame_planes(), True)
    torch._dynamo.reset()
    compiled = torch.compile(packed, backend=backend, fullgraph=True)
    for tokens in (1, products.FEW_ROWS["cpu"] + 1):
        x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 40])
def test_packed_linear_is_exported_for_any_number_of_rows(rows):
    layer, packed = layer_of(frame_planes(), True)
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1))
    dynamic = ({0: torch.export.Dim("rows", min=2)},)
    program = torch.export.export(packed, (torch.zeros(5, 96),), dynamic_shapes=dynamic).module()
    torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-4)


def test_integers_and_other_widths_are_refused_with_the_remedy():
    packed = layer_of(lattice(4), False)[1]
    with pytest.raises(ValueError, match=r"x is torch.uint8 \[2, 96\]; this layer takes floats .* casts .* in `skip`"):
        packed(torch.zeros(2, 96, dtype=torch.uint8))
    for width in (1, 48, 192):
        with pytest.raises(
            ValueError, match=rf"x is torch.float32 \[2, {width}\]; this layer takes floats \[..., 96\]"
        ):
            packed(torch.zeros(2, width))
