"""The symbol table of notebook 07 against the code: every name exists where the table says, every shape holds.

The table is read from the notebook. Names are looked up in the module of their row; tensors are those of a small layer,
one for each class, and shapes such as `[out, n k / d]` are worked out with its sizes.
"""

import importlib
import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lcqat_min.codebook import CodedMatrix, TableCodebook, frame_planes
from lcqat_min.layer.linear import AffineLinear
from lcqat_min.layer.rotation import block_of, random_signs
from lcqat_min.packing.convert import pack_layers
from lcqat_min.ptq.moments import Moments, factorize
from lcqat_min.systems.free_vq import TableLinear

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "07-build-the-layer.ipynb"
HEAD = ["symbol", "in code", "shape", "where"]
SIZES = {"out": 12, "n": 48, "d": 4, "k": 8, "m": 8, "levels": 2, "B": 16}  # no two products of interest are equal
SYMBOLS = (
    "W", "W_hat", "d", "levels", "q", "A", "b", "v", "r", "c", "s_in", "s_out", "U", "H", "C", "index",
)  # fmt: skip


def table() -> list[list[str]]:
    """Rows of the symbol table, each [symbol, in code, shape, where]."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    lines = "\n".join(texts).splitlines()
    start = lines.index(f"| {' | '.join(HEAD)} |")
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([part.strip() for part in line.strip("|").split("|")])
    return rows


ROWS = table()


@pytest.fixture(scope="module")
def things() -> dict[str, object]:
    """An object of each class that the table names, all of one small layer."""
    generator = torch.Generator().manual_seed(0)
    rows, n, book = SIZES["out"], SIZES["n"], frame_planes()
    index = torch.randint(256, (rows, n // book.dim), generator=generator)
    target = torch.randn(rows, n, generator=generator)
    signs = random_signs(n, generator), random_signs(rows, generator)
    coded = CodedMatrix(book, index, torch.ones(rows))
    affine = AffineLinear(coded, n, None, signs, target)
    packed = pack_layers(affine)[""]
    H = torch.eye(n, dtype=torch.float64)
    made = (affine, packed, packed.spec, book, Moments(H, 1), factorize(H))
    lookup = TableLinear(CodedMatrix(TableCodebook(book.codewords()), index, torch.ones(rows)), n, None, signs)
    return {type(thing).__name__: thing for thing in (*made, lookup)} | {"QuantLinear": affine}


def found(name: str, where: str, things: dict[str, object]) -> object:
    """What `name` of the module linked in `where` stands for: an attribute, or what a function returns."""
    module = importlib.import_module(re.search(r"\(\.\./(lcqat_min/[\w/]+)\.py\)", where)[1].replace("/", "."))
    first, *attributes = name.split(".")
    thing = getattr(module, first)
    if not attributes:
        given = {
            "weight_of": nn.Linear(SIZES["n"], SIZES["out"]),
            "block_of": SIZES["n"],
            "hadamard": block_of(SIZES["n"]),
        }
        return thing(given[name])
    assert thing.__module__ == module.__name__, f"{first} is defined in {thing.__module__}"
    assert isinstance(things[first], thing)
    value = getattr(things[first], *attributes)
    return value() if callable(value) and not isinstance(value, Tensor) else value


def shape_of(text: str) -> list[int]:
    """`[out, n k / d]` -> numbers: products, quotients and powers of the letters in SIZES."""
    shape = []
    for part in text.strip("[]").split(","):
        above, *below = (factors.split() for factors in part.split("/"))
        value = Fraction(1)
        for factor in above:
            value *= number(factor)
        for factor in (each for group in below for each in group):
            value /= number(factor)
        assert value.denominator == 1, f"{part} is no whole number for the sizes of the test"
        shape.append(int(value))
    return shape


def number(factor: str) -> int:
    base, *power = factor.split("^")
    value = int(base) if base.isdigit() else SIZES[base]
    return value ** number(power[0]) if power else value


def test_every_symbol_of_the_formulas_has_a_row():
    letters = [re.split(r"[,\s]", row[0])[0] for row in ROWS]
    assert set(SYMBOLS) <= set(letters)
    assert all(letters.count(letter) == 1 for letter in letters if letter != "index"), "one meaning per letter"
    assert all(len(row) == len(HEAD) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_name_and_shape_are_those_of_the_code(row, things):
    symbol, name, shape, where = row
    thing = found(re.fullmatch(r"`([\w.]+)`", name)[1], where, things)
    if shape == "integer":
        letter = symbol.split(",")[0]
        assert isinstance(thing, int) and thing == SIZES[letter], f"{name} is {thing}"
    else:
        assert isinstance(thing, Tensor) and list(thing.shape) == shape_of(shape), f"{name} is {list(thing.shape)}"


def test_shapes_are_read_as_written():
    assert shape_of("[out, n k / d]") == [12, 96]
    assert shape_of("[2^m, d]") == [256, 4]
    with pytest.raises(AssertionError, match="no whole number"):
        shape_of("[k / n]")
