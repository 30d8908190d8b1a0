"""The trained layers against slow, obvious versions: Hadamard matrices, loops, gradients by hand.

Checked: the forward pass for every kind, rotation and odd width; starting latents round to their codes
whatever the targets, and equal a bit's margin; the scalar grid inside the lattice inside the planes; every
gradient against the chain rule and finite differences; LSQ's step gradient; dtypes, autocast, copies;
root mean squares from the smallest to the largest numbers of fp32; error messages.
"""

import copy
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lcqat_min import codebook as cb
from lcqat_min.codebook.digits import digits_of, index_of
from lcqat_min.codebook.matrix import CodedMatrix
from lcqat_min.codebook.trellis import TrellisCodebook
from lcqat_min.layer.linear import MARGIN, AffineLinear, QuantLinear, in_units, root_mean_square, starting_latents
from lcqat_min.layer.rotation import KEPT, random_signs
from lcqat_min.layer.trellis import TrellisLinear, starting_bits
from lcqat_min.systems.free_vq import TableLinear
from lcqat_min.systems.lsq import StepLinear

PLAIN = (None, None)  # not rotated
ROTATIONS = ("none", "input", "both")
KINDS = [
    ("scalar", 1),
    ("step", 1),
    *((kind, d) for kind in ("lattice", "planes") for d in (1, 2, 4, 8)),
    *(("trellis", d) for d in (1, 2, 3)),
    *(("table", d) for d in (1, 2, 4)),
]
SMOOTH = [("scalar", 1), ("lattice", 4), ("planes", 4), ("planes", 8), ("trellis", 2), ("table", 2)]


def some_codebook(kind: str, d: int, generator: torch.Generator) -> cb.Codebook:
    """A codebook of a kind with random numbers in it (step: the unit grid that it needs)."""
    if kind == "step":
        return cb.scalar()
    if kind == "table":
        return cb.TableCodebook(torch.randn(4**d, d, generator=generator))
    if kind == "trellis":
        return TrellisCodebook(torch.randn(3, d, 2 * d, generator=generator))
    levels, k = (2, 2 * d) if kind == "planes" else (4, d)
    A = torch.randn(d, k, generator=generator) + torch.eye(d).repeat(1, k // d)
    return cb.AffineCodebook(A, 0.1 * torch.randn(d, generator=generator), levels)


def some_codes(
    book: cb.Codebook, rows: int, width: int, generator: torch.Generator
) -> tuple[CodedMatrix, torch.Tensor]:
    """Random codes, with the first and the last code among them, and targets near what they decode to."""
    index = torch.randint(2**book.bits, (rows, -(-width // book.dim)), generator=generator)
    index[0, 0], index[-1, -1] = 0, 2**book.bits - 1
    decoded = book.decode(index).flatten(1)
    target = decoded + 0.2 * torch.randn(decoded.shape, generator=generator)
    scale = 0.5 + torch.rand(rows, generator=generator)
    return CodedMatrix(book, index, scale), target


def some_layer(
    kind: str,
    d: int,
    rows: int,
    width: int,
    rotate: str,
    generator: torch.Generator,
    bias: bool = False,
    estimator: str = "ste",
) -> tuple[QuantLinear, CodedMatrix]:
    """A layer of a kind with random codes, scales and (if asked) bias."""
    coded, target = some_codes(some_codebook(kind, d, generator), rows, width, generator)
    signs_in = None if rotate == "none" else random_signs(width, generator)
    signs_out = random_signs(rows, generator) if rotate == "both" else None
    biases = torch.randn(rows, generator=generator) if bias else None
    common = (coded, width, biases, (signs_in, signs_out))
    if kind == "step":
        layer = StepLinear(*common, target)
    elif kind == "table":
        layer = TableLinear(*common)
    elif kind == "trellis":
        layer = TrellisLinear(*common, target, estimator)
    else:
        layer = AffineLinear(*common, target, estimator)
    with torch.no_grad():
        layer.col_scale.copy_(0.5 + torch.rand(width, generator=generator))
    return layer, coded


@lru_cache(maxsize=32)
def blocks(width: int) -> torch.Tensor:
    """fp64 [width, width]: the block-diagonal Hadamard matrix, entry by entry."""
    block = 1
    while block < 128 and width % (2 * block) == 0:
        block *= 2
    M = torch.zeros(width, width, dtype=torch.float64)
    for i in range(width):
        for j in range(i // block * block, (i // block + 1) * block):
            M[i, j] = (-1) ** (i % block & j % block).bit_count() / block**0.5
    return M


def mixing(signs: torch.Tensor | None, width: int) -> torch.Tensor:
    """fp64 [width, width]: diag(signs) times the Hadamard matrix; not rotated: the identity."""
    return torch.eye(width, dtype=torch.float64) if signs is None else signs.double()[:, None] * blocks(width)


def decode_by_loops(layer: QuantLinear) -> torch.Tensor:
    """fp64 [out, in padded]: one vector after the other, digit by digit from the code."""
    rows = []
    for codes in layer.indices().tolist():
        vectors = []
        if isinstance(layer, TrellisLinear):
            vectors = [in_window(layer.taps.double(), codes[g:]) for g in range(len(codes))]
            codes = []
        for code in codes:
            if isinstance(layer, TableLinear):
                vectors.append(layer.table[code].double())
            elif isinstance(layer, StepLinear):
                vectors.append(torch.tensor([code - 1.5], dtype=torch.float64))
            else:
                k, levels = layer.A.shape[1], layer.levels
                digits = [code // levels ** (k - 1 - i) % levels for i in range(k)]
                q = [2 * digit - 1 if levels == 2 else digit - 1.5 for digit in digits]
                vectors.append(layer.A.double() @ torch.tensor(q, dtype=torch.float64) + layer.b.double())
        rows.append(torch.cat(vectors))
    return torch.stack(rows).detach()


def in_window(taps: torch.Tensor, codes: list[int]) -> torch.Tensor:
    """fp64 [d]: the vector of the first of these codes, which the next ones share in."""
    m = taps.shape[2]
    bits = [[2 * (code >> (m - 1 - i) & 1) - 1 for i in range(m)] for code in codes[: len(taps)]]
    return sum(tap @ torch.tensor(c, dtype=torch.float64) for tap, c in zip(taps, bits, strict=False))


def dense(layer: QuantLinear) -> torch.Tensor:
    """W_hat, fp64 [out, in], as the module's formula says: s_out H_out [r decode] H_in s_in c."""
    M = (layer.row_scale.double()[:, None] * decode_by_loops(layer))[:, : layer.in_features]
    left, right = mixing(layer.signs_out, layer.out_features), mixing(layer.signs_in, layer.in_features)
    return (left @ M @ right.T * layer.col_scale.double()).detach()


@pytest.mark.parametrize("rotate", ROTATIONS)
@pytest.mark.parametrize(("kind", "d"), KINDS)
def test_forward_is_the_dense_formula(kind, d, rotate, generator):
    for rows, width, bias in ((6, 7, False), (5, 33, True), (4, 130, False), (8, 24, True)):
        layer, coded = some_layer(kind, d, rows, width, rotate, generator, bias)
        assert torch.equal(layer.indices(), coded.index)
        x = torch.randn(2, 3, width, generator=generator)
        expected = x.double() @ dense(layer).T
        if bias:
            expected = expected + layer.bias
        torch.testing.assert_close(layer(x).double(), expected.detach(), rtol=1e-4, atol=1e-4)
        assert layer.weight.shape == (rows, width)


@pytest.mark.parametrize("levels", [2, 4])
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 0.3, 3.0, 1e6]),
    d=st.integers(1, 4),
    on_codes=st.booleans(),
)
def test_starting_latents_round_to_their_codes(levels, seed, spread, d, on_codes):
    generator = torch.Generator().manual_seed(seed)
    book = some_codebook("planes" if levels == 2 else "lattice", d, generator)
    coded, near = some_codes(book, 5, 3 * d, generator)
    target = near + spread * torch.randn(near.shape, generator=generator)
    layer = AffineLinear(coded, 3 * d, None, PLAIN, None if on_codes else target)
    assert torch.equal(layer.indices(), coded.index)
    if d == 1 and levels == 4:
        assert torch.equal(StepLinear(coded, 3, None, PLAIN, target).indices(), coded.index)


def test_extreme_codes_of_a_byte_keep_their_place():
    for book in (cb.lattice(4), cb.lattice(4).as_planes()):
        index = torch.tensor([[0, 255, 1, 254]])
        target = 100 * book.decode(index).flatten(1)
        layer = AffineLinear(CodedMatrix(book, index, torch.ones(1)), 16, None, PLAIN, target)
        assert torch.equal(layer.indices(), index)
        assert layer.weight[0, :8].tolist() == [-1.5] * 4 + [1.5] * 4


def test_a_planes_latent_is_the_margin_of_its_bit(generator):
    coded, target = some_codes(some_codebook("planes", 2, generator), 6, 8, generator)
    book, v = coded.codebook, starting_latents(coded, target)
    targets = target.view(6, 4, 2)
    inside = 0
    for row in range(6):
        for vector in range(4):
            code, target = coded.index[row, vector].item(), targets[row, vector]
            cost = (target - book.decode(torch.tensor(code))).square().sum()
            for k in range(4):
                flipped = code ^ 1 << (3 - k)
                change = (target - book.decode(torch.tensor(flipped))).square().sum() - cost
                q = 1 if code >> (3 - k) & 1 else -1
                margin = change / (4 * book.A[:, k].square().sum())
                bounded = margin.clamp(MARGIN, 2 - MARGIN)
                inside += bool(bounded == margin)
                torch.testing.assert_close(q * v[row, vector, k], bounded, rtol=1e-4, atol=1e-5)
    assert inside > 40  # of 96: the bound did not hide the formula


def test_a_trellis_latent_is_the_margin_of_its_bit(generator):
    """Of a bit that takes part in several vectors: by flipping it and decoding the whole row again."""
    coded, target = some_codes(some_codebook("trellis", 2, generator), 4, 20, generator)
    book, v, inside = coded.codebook, starting_bits(coded, target), 0
    before = (book.decode(coded.index).flatten(1) - target).square().sum(1)
    for vector in range(3, 10):  # the first bits take part in fewer vectors, so theirs is a lower bound
        for bit in range(4):
            flipped = coded.index.clone()
            flipped[:, vector] ^= 1 << (3 - bit)
            change = (book.decode(flipped).flatten(1) - target).square().sum(1) - before
            margin = change / (4 * book.taps[:, :, bit].square().sum())
            q = 2 * (coded.index[:, vector] >> (3 - bit) & 1) - 1
            bounded = margin.clamp(MARGIN, 2 - MARGIN)
            inside += (bounded == margin).sum().item()
            torch.testing.assert_close(q * v[:, vector, bit], bounded, rtol=1e-4, atol=1e-5)
    assert inside > 40
    for start in (target, None):
        layer = TrellisLinear(coded, 20, None, PLAIN, start)
        assert torch.equal(layer.indices(), coded.index)
    assert set(layer.latent.unique().tolist()) == {-1.0, 1.0}


def test_a_scalar_latent_is_the_weight_in_bins(generator):
    weights = torch.linspace(-1.9, 1.9, 40)[None]
    book = cb.scalar(0.8)
    coded = CodedMatrix(book, book.encode(weights.mT).view(1, -1), torch.ones(1))
    u = starting_latents(coded, weights).flatten()
    in_bins = weights.flatten() / 0.8 + 1.5
    from_edge = (in_bins - in_bins.floor() - 0.5).abs()
    far_from_edges = (from_edge > MARGIN / 2) & (in_bins > -0.4) & (in_bins < 3.4)
    assert far_from_edges.sum() > 20
    torch.testing.assert_close(u[far_from_edges], in_bins[far_from_edges], rtol=0, atol=1e-5)
    assert ((u - in_bins).abs() < 0.95).all()


@pytest.mark.parametrize("on_codes", [False, True])
def test_lattice_with_a_multiple_of_the_identity_is_the_scalar_layer(on_codes, generator):
    s, rows, width = 0.7, 5, 12
    one, target = some_codes(cb.scalar(s), rows, width, generator)
    index = index_of(digits_of(one.index, 1, 4).view(rows, 3, 4), 4)
    four = CodedMatrix(cb.lattice(4, s), index, one.scale)
    signs = random_signs(width, generator), random_signs(rows, generator)
    start = None if on_codes else target
    scalar, lattice = (AffineLinear(coded, width, None, signs, start) for coded in (one, four))
    torch.testing.assert_close(lattice.latent, scalar.latent, rtol=0, atol=1e-6)
    assert torch.equal(lattice.weight, scalar.weight)
    for layer in (scalar, lattice):
        layer(torch.ones(2, width)).square().sum().backward()
    torch.testing.assert_close(lattice.latent.grad, scalar.latent.grad)


def test_planes_with_half_the_columns_twice_are_the_lattice_layer(generator):
    z, target = some_codes(some_codebook("lattice", 4, generator), 5, 12, generator)
    tied = z.codebook.as_planes()
    assert torch.equal(tied.A[:, 1::2], z.codebook.A / 2)
    lattice, planes = (AffineLinear(coded, 12, None, PLAIN, target) for coded in (z, replace(z, codebook=tied)))
    torch.testing.assert_close(planes.weight, lattice.weight)


def surrogate(u: torch.Tensor, top: int, estimator: str) -> torch.Tensor:
    """dq/du by the formulas of layer/surrogate.py, one number at a time."""
    slopes = []
    for value in u.flatten().tolist():
        if estimator == "ste":
            slopes.append(1.0)
        elif estimator == "clipped":
            slopes.append(1.0 if -0.5 <= value <= top + 0.5 else 0.0)
        else:
            cell = min(max(int(value // 1), 0), top - 1)
            distance = abs(2 * (value - cell) - 1)
            slopes.append(min(distance ** (1 / 5 - 1) / 5, 3.0) if distance else 3.0)
    return torch.tensor(slopes, dtype=torch.float64).view(u.shape)


@pytest.mark.parametrize("estimator", ["ste", "clipped", "dge"])
@pytest.mark.parametrize(("kind", "d"), [("scalar", 1), ("lattice", 2), ("planes", 4)])
def test_gradients_are_the_chain_rule(kind, d, estimator, generator):
    rows, width = 4, 6
    layer, _ = some_layer(kind, d, rows, width, "both", generator, bias=True, estimator=estimator)
    with torch.no_grad():  # far enough that some latents leave the grid
        layer.latent.add_(0.8 * torch.randn(layer.latent.shape, generator=generator))
    x, upstream = torch.randn(3, width, generator=generator), torch.randn(3, rows, generator=generator)
    layer(x).backward(upstream)

    dW = upstream.double().T @ x.double()
    left, right = mixing(layer.signs_out, rows), mixing(layer.signs_in, width)
    decoded, r, c = decode_by_loops(layer), layer.row_scale.double(), layer.col_scale.double()
    dM = left.T @ (dW * c) @ right  # of [r decode], cut to the width
    d_decoded = torch.zeros_like(decoded)
    d_decoded[:, :width] = dM * r[:, None]
    per_vector = d_decoded.view(-1, d)
    q = digits_of(layer.indices(), layer.A.shape[1], layer.levels).double().view(-1, layer.A.shape[1])
    latent = layer.latent.detach()
    u, top = ((latent + 1) / 2, 1) if layer.levels == 2 else (latent, 3)
    expected = {
        "latent": (per_vector @ layer.A.double()).view(latent.shape) * surrogate(u, top, estimator),
        "A": per_vector.T @ q,
        "b": per_vector.sum(0),
        "row_scale": (dM * decoded[:, :width]).sum(1),
        "col_scale": (dW * dense(layer) / c).sum(0),
        "bias": upstream.double().sum(0),
    }
    assert set(expected) == {name for name, _ in layer.named_parameters()}
    for name, parameter in layer.named_parameters():
        found, wanted = parameter.grad.double(), expected[name].detach()
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("kind", "d"), SMOOTH)
def test_smooth_parameters_agree_with_finite_differences(kind, d, generator):
    layer, _ = some_layer(kind, d, 4, 10, "both", generator, bias=True)
    x, weights = torch.randn(5, 10, generator=generator), torch.randn(5, 4, generator=generator)

    def value() -> float:
        return (layer(x) * weights).sum().double().item()

    (layer(x) * weights).sum().backward()
    codes = layer.indices()
    for name, parameter in layer.named_parameters():
        if name == "latent":
            continue
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(0, flat.numel(), max(1, flat.numel() // 12)):
            here = flat[i].item()
            flat[i] = here + 0.25  # the output is linear in each number: any distance will do
            above = value()
            flat[i] = here - 0.25
            below = value()
            flat[i] = here
            assert (above - below) / 0.5 == pytest.approx(grad[i].item(), rel=2e-3, abs=2e-3), name
    assert torch.equal(layer.indices(), codes)


def test_step_gradient_is_that_of_lsq(generator):
    rows, width = 3, 9
    layer, _ = some_layer("step", 1, rows, width, "none", generator)
    with torch.no_grad():
        layer.col_scale.fill_(1)
        layer.latent.copy_(layer.row_scale[:, None] * torch.linspace(-2.6, 2.6, width))  # beyond 2: outside
    x, upstream = torch.randn(4, width, generator=generator), torch.randn(4, rows, generator=generator)
    layer(x).backward(upstream)
    g = upstream.T @ x
    for i in range(rows):
        total = 0.0
        for j in range(width):
            u = (layer.latent[i, j] / layer.row_scale[i]).item()
            q = min(max(round(u + 1.5), 0), 3) - 1.5
            inside = abs(u) <= 2
            here = g[i, j].item()
            total += here * (q - u if inside else 1.5 if u > 0 else -1.5)
            assert layer.latent.grad[i, j].item() == pytest.approx(here if inside else 0.0, rel=1e-5)
        assert layer.row_scale.grad[i].item() == pytest.approx(total, rel=1e-4, abs=1e-5)


def test_step_levels_are_those_of_paretoq(generator):
    layer, _ = some_layer("step", 1, 2, 200, "none", generator)
    with torch.no_grad():
        layer.col_scale.fill_(1)
    alpha = 2 * layer.row_scale[0].item()
    levels = sorted(set(layer.weight[0].tolist()))
    assert levels == pytest.approx([-0.75 * alpha, -0.25 * alpha, 0.25 * alpha, 0.75 * alpha])


@pytest.mark.parametrize("kind", ["planes", "step", "table"])
def test_low_precision_inputs_and_autocast(kind, generator):
    layer, coded = some_layer(kind, 1 if kind == "step" else 4, 8, 64, "both", generator, bias=True)
    x = torch.randn(3, 64, generator=generator)
    y, W = layer(x), layer.weight
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-4)):
        low = layer(x.to(dtype))
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), y, rtol=tolerance, atol=tolerance * y.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer.weight, W)
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.indices(), coded.index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_in_low_precision_says_what_to_do(dtype, generator):
    layer, _ = some_layer("planes", 4, 4, 8, "none", generator)
    with pytest.raises(TypeError, match=f"{dtype}.*torch.autocast"):
        layer.to(dtype)(torch.ones(1, 8, dtype=dtype))


def test_a_layer_first_used_in_inference_mode_still_trains(generator):
    layer, _ = some_layer("planes", 4, 8, 64, "both", generator)
    KEPT.clear()
    with torch.inference_mode():
        layer(torch.ones(1, 64))
    layer(torch.ones(1, 64)).sum().backward()
    assert layer.latent.grad.abs().sum() > 0


def test_a_matrix_of_zeros_has_finite_latents():
    book = cb.AffineCodebook(torch.zeros(4, 8), torch.zeros(4), 2)
    coded = CodedMatrix(book, torch.tensor([[0, 255]]), torch.ones(1))
    layer = AffineLinear(coded, 8, None, PLAIN, torch.zeros(1, 8))
    assert torch.isfinite(layer.latent).all()
    assert torch.equal(layer(torch.ones(1, 8)), torch.zeros(1, 1))


@pytest.mark.parametrize(("kind", "d"), KINDS)
def test_copies_and_state_dicts_keep_the_output(kind, d, generator):
    layer, _ = some_layer(kind, d, 4, 16, "both", generator, bias=True)
    other, _ = some_layer(kind, d, 4, 16, "both", generator, bias=True)
    x = torch.randn(2, 16, generator=generator)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_layers_can_share_a_table_and_copies_share_the_copy(generator):
    book = some_codebook("table", 2, generator)
    table = nn.Parameter(book.table.clone())
    pair = nn.Sequential(
        *(TableLinear(some_codes(book, rows, 8, generator)[0], 8, None, PLAIN, table) for rows in (8, 3))
    )
    twin = copy.deepcopy(pair)
    assert twin[0].table is twin[1].table
    assert twin[0].table is not table
    assert sum(name.endswith("table") for name, _ in pair.named_parameters()) == 1


def test_repr_says_the_shape_and_what_is_rotated(generator):
    for rotate, words in (("none", "rotated=no"), ("input", "rotated=in"), ("both", "rotated=in+out")):
        layer, _ = some_layer("planes", 2, 3, 6, rotate, generator)
        assert layer.extra_repr() == f"in=6, out=3, {words}"


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-3, 1.0, 1e30, 1e38])
def test_squares_of_any_size_fit(generator, size):
    x = torch.randn(7, 5, generator=generator).clamp(-3, 3) * size
    assert root_mean_square(x) == pytest.approx(x.double().square().mean().sqrt().item(), rel=1e-5)
    scaled, unit = in_units(x)
    assert torch.equal(scaled * unit, x) and scaled.abs().max() < 4


def test_zeros_have_size_zero():
    x = torch.nn.Parameter(torch.zeros(3))
    assert root_mean_square(x) == 0 and in_units(x)[1] == 1
