"""From layers in training to packed layers and back, and the rounding of their numbers in between.

Codes are exact, but scales and codebooks train in fp32 and are stored as fp16. bf16 would move the outputs
more (it has 8 bits where fp16 has 11) and fp32 would cost as much again: 0.1 bits a weight at width 256.
What fp16 lacks is range: below 6e-5 it loses digits, above 65504 it ends. Row scales that leave this range
are multiplied by a power of two, 2^-exponent, which is exact.

`to_storage_precision` rounds a model in training to the numbers that its file will hold. From then on the
model, its packed layers and its dense export are one and the same map: what was measured is what is
shipped.

Limits: latents are not stored. Layers that come back from packed ones start on their codes; they give
the same outputs, but have forgotten which codes were about to flip.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..codebook.affine import scalar
from ..codebook.matrix import Rounded
from ..codebook.table import TableCodebook
from ..errors import UsageError
from ..layer.linear import AffineLinear, QuantLinear, StepLinear, TableLinear
from .layer import Form, PackedLinear, pack_bits, share_tables

FP16_NORMAL = 2.0**-14, 65504.0  # the range that fp16 covers with all of its 11 bits


def forms_of(model: nn.Module) -> dict[str, Form]:
    """Form of every quantized layer of `model`, by name: of those in training and of packed ones."""
    owners: dict[int, str] = {}
    names = {id(module): name for name, module in model.named_modules()}
    forms = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):  # in a part of a packed model its owner has another name than there
            owner = names.get(id(layer.owner[0]), layer.form.owner) if layer.owner else ""
            forms[name] = replace(layer.form, owner=owner)
        elif isinstance(layer, QuantLinear):
            owner = owners.setdefault(id(layer.table), name) if isinstance(layer, TableLinear) else ""
            forms[name] = _form(layer, owner)
    return forms


def pack_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Packed layers of `model`, by name, on its device. The model is not changed.

    ValueError for scales or codebooks that fp16 cannot hold.
    """
    layers = {}
    for name, form in forms_of(model).items():
        layer = model.get_submodule(name)
        layers[name] = _renamed(layer, form) if isinstance(layer, PackedLinear) else _pack(layer, form, name)
    share_tables(layers)
    return layers


def unpack_layers(layers: dict[str, PackedLinear]) -> dict[str, QuantLinear]:
    """Trainable layers with the same weights, by name: latents on the codes, a shared table shared again."""
    tables: dict[str, nn.Parameter] = {}
    return {name: _unpack(layer, tables) for name, layer in layers.items()}


@torch.no_grad()
def to_storage_precision(model: nn.Module) -> None:
    """Round scales and codebooks of a model in training, in place, to the numbers that its file will hold.

    Codes stay the same: where the row scale is a step size (StepLinear), the latents are scaled along. Doing
    it twice changes nothing more. ValueError, before anything is changed, for numbers that fp16 cannot hold.
    """
    rounded = [
        (layer, *_side_data(layer, name)) for name, layer in model.named_modules() if isinstance(layer, QuantLinear)
    ]
    for layer, numbers, exponent in rounded:
        codes, old = layer.codes(), layer.row_scale.clone()
        for key, value in numbers.items():
            getattr(layer, key).copy_(value)
        layer.row_scale.mul_(2.0**exponent)
        if isinstance(layer, StepLinear):
            layer.latent.mul_((layer.row_scale / old)[:, None])
            on_code = scalar().to(old.device).decode(codes).flatten(1) * layer.row_scale[:, None]
            layer.latent.copy_(torch.where(layer.codes() == codes, layer.latent, on_code))


def _form(layer: QuantLinear, owner: str) -> Form:
    if isinstance(layer, AffineLinear):
        book, kind, learn = layer.codebook(), "affine", layer.A.requires_grad
    elif isinstance(layer, TableLinear):
        book, kind, learn = TableCodebook(layer.table), "table", layer.table.requires_grad
    else:
        book, kind, learn = scalar(), "step", True
    return Form(
        kind,
        layer.in_features,
        layer.out_features,
        book.dim,
        book.bits,
        getattr(book, "levels", 0),
        layer.signs_in is not None,
        layer.signs_out is not None,
        layer.bias is not None,
        0,
        owner,
        getattr(layer, "estimator", "ste"),
        learn,
    )


def _side_data(layer: QuantLinear, name: str) -> tuple[dict[str, Tensor], int]:
    """Scales and codebook of a layer as fp16, and the exponent of its row scales."""
    scales = layer.row_scale.detach().abs()
    largest = scales.max().item()
    smallest = torch.where(scales > 0, scales, largest).min().item()
    fits = FP16_NORMAL[0] <= smallest and largest <= FP16_NORMAL[1]
    exponent = 0
    if not fits and 0 < largest < math.inf:  # bring the largest to 2^14 ... 2^15, also when it is rounded up
        exponent = math.frexp(largest * (1 + 2**-11))[1] - 15
    numbers = {
        key: value.detach()
        for key in ("row_scale", "col_scale", "A", "b", "table")
        if isinstance(value := getattr(layer, key, None), Tensor)
    }
    numbers["row_scale"] = numbers["row_scale"] * 2.0**-exponent
    halves = {key: value.half() for key, value in numbers.items()}
    halves["row_scale"][halves["row_scale"] == 0] = 2.0**-24  # of a row of zeros; a learned step divides by it
    for key, value in halves.items():
        if not torch.isfinite(value).all():
            worst = numbers[key].abs().max().item()
            raise UsageError(
                f"{key} of layer {name!r} reaches {worst:.3g}, but a packed file holds numbers "
                f"up to {FP16_NORMAL[1]:.0f}. Did training diverge? Train at a lower rate."
            )
    return halves, exponent


def _renamed(layer: PackedLinear, form: Form) -> PackedLinear:
    if layer.form == form:
        return layer
    twin = copy.copy(layer)
    twin.form = form
    return twin


@torch.no_grad()
def _pack(layer: QuantLinear, form: Form, name: str) -> PackedLinear:
    numbers, exponent = _side_data(layer, name)
    packed = PackedLinear(replace(form, exponent=exponent), name)
    numbers["weight"] = pack_bits(layer.codes(), form.bits)
    for side in ("in", "out"):
        if (signs := getattr(layer, f"signs_{side}")) is not None:
            numbers[f"signs_{side}"] = pack_bits((signs > 0).long()[None], 1)[0]
    for key in form.tensors(name):
        setattr(packed, key, numbers[key])
    if form.bias:
        packed.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return packed


def _unpack(layer: PackedLinear, tables: dict[str, nn.Parameter]) -> QuantLinear:
    form, book, index = layer.form, layer.codebook(), layer.codes()
    rounded = Rounded(book, index, layer.scale(), book.decode(index).flatten(1), layer.scale().double())
    common = (form.inputs, form.outputs, rounded, layer.bias, layer.signs("in"), layer.signs("out"))
    if form.kind == "affine":
        made = AffineLinear(*common, form.estimator, form.learn_codebook, start_on_codes=True)
    elif form.kind == "step":
        made = StepLinear(*common)
    else:
        table = tables.setdefault(form.owner, nn.Parameter(book.table, requires_grad=form.learn_codebook))
        made = TableLinear(*common, table)
    made.col_scale.data.copy_(layer.col_scale)
    return made
