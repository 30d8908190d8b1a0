"""Which layers are quantized: not those whose weight the model uses itself, nor adapters, nor what text does not reach.

Models that use a weight in any other way than by calling its layer are quantized around it, and go on to work, packed,
too; looking for such layers leaves no trace in the model.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kinds import method
from torch import nn

from lcqat_min import quantize
from lcqat_min.layer.linear import quant_layers
from lcqat_min.packing.convert import pack_layers
from lcqat_min.ptq.model import linear_layers
from lcqat_min.ptq.select import BYPASSED, HELPER, OUTSIDE, SHARED, left_alone, read_or_written

IDS = torch.arange(22).view(2, 11) % 11
SCALAR = method("scalar", rotate="none", refits=0)


class Net(nn.Module):
    """Two layers; the second is used as `use` says."""

    def __init__(self, use=None) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.use, self.rescaled = use or (lambda model, x: model.second(x)), False

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> SimpleNamespace:
        return SimpleNamespace(logits=self.use(self, self.first(self.embed(input_ids))))


def writes_when_the_mode_changes(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if model.rescaled == model.training:
        with torch.no_grad():
            model.second.weight.mul_(2 if model.training else 0.5)
        model.rescaled = not model.training
    return model.second(x if model.training else 2 * x)


def writes_data(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    model.second.weight.data.clamp_(-1, 1)
    return model.second(x)


USES = {
    "linear": lambda model, x: F.linear(x, model.second.weight, model.second.bias),
    "transposed": lambda model, x: x @ model.second.weight.T,
    "data": lambda model, x: x @ model.second.weight.data.t(),
    "rows": lambda model, x: torch.cat([x @ row for row in model.second.weight[3:, :, None]], -1),
    "both": lambda model, x: model.second(x) + x @ model.second.weight.T,
    "norm": lambda model, x: model.second(x) / torch.stack([model.second.weight]).norm(),
    "in training": lambda model, x: x @ model.second.weight.T if model.training else model.second(x),
    "clamp": writes_data,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_layer_whose_weight_is_used_otherwise_is_named_and_stays(use):
    model = Net(use)
    before = model.second.weight.detach().clone()
    expected = before.clamp(-1, 1) if use is writes_data else before
    with pytest.warns(RuntimeWarning, match="not quantized: second; the model reads or writes their weight itself"):
        assert [report.name for report in quantize(model, [IDS], SCALAR)] == ["first"]
    assert type(model.second) is nn.Linear
    assert torch.equal(model.second.weight, expected)
    for name, layer in pack_layers(model).items():
        model.set_submodule(name, layer)
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("before", ["new", "trained", "evaluated"])
def test_a_weight_that_is_rescaled_when_the_mode_changes_goes_on_to_be(before):
    model = Net(writes_when_the_mode_changes)
    if before != "new":
        model.train(before == "trained")(IDS)
    with pytest.warns(RuntimeWarning, match="not quantized: second"):
        quantize(model, [IDS], SCALAR)
    trained, evaluated = (model.train(mode)(IDS).logits - model.second.bias for mode in (True, False))
    torch.testing.assert_close(trained, evaluated)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "use",
    [
        None,
        lambda model, x: model.second(x.to(model.second.weight.dtype).to(model.second.weight.device)),
        lambda model, x: model.second(x) * model.second.weight.shape[0] + model.second.bias,
    ],
)
def test_what_asks_a_weight_for_its_dtype_or_shape_only_is_quantized(use):
    model = Net(use)
    assert [report.name for report in quantize(model, [IDS], SCALAR)] == ["first", "second"]
    model(IDS)


class Attention(nn.Module):
    """torch's own layer, which reads the weight of out_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> SimpleNamespace:
        x = self.embed(input_ids)
        return SimpleNamespace(logits=self.linear(self.layer(x, x, x)[0]))


@pytest.mark.filterwarnings("ignore:not quantized")
def test_torch_own_attention_works_quantized_and_packed():
    model = Attention().eval()
    assert [report.name for report in quantize(model, [IDS], SCALAR)] == ["linear"]
    with torch.no_grad():
        expected = model(IDS).logits
        for name, layer in pack_layers(model).items():
            model.set_submodule(name, layer)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-2, atol=1e-2)


def test_architectures_that_do_so(recwarn):
    from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

    shape = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2}
    mamba = MambaForCausalLM(MambaConfig(**shape, state_size=4, time_step_rank=4)).eval()
    rwkv = RwkvForCausalLM(RwkvConfig(**shape, rescale_every=1, attention_hidden_size=16, intermediate_size=16)).eval()
    for model, some, stay in (
        (mamba, "mixer.in_proj", {"mixer.dt_proj"}),
        (rwkv, "attention.key", {"attention.output", "feed_forward.value"}),
    ):
        before = {name.split(".", 3)[-1] for name, _ in linear_layers(model)}
        quantize(model, [IDS], SCALAR)
        after = {name.split(".", 3)[-1] for name, _ in quant_layers(model)}
        assert before - after == stay and some in after
        for name, layer in pack_layers(model).items():
            model.set_submodule(name, layer)
        assert torch.isfinite(model(input_ids=IDS, use_cache=False).logits).all()


class Stateful(Net):
    """Running means, dropout, and a training mode that fails after it has changed them."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.drop.eval()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> SimpleNamespace:
        x = self.mean(self.first(self.embed(input_ids)).mT).mT
        x = F.dropout(x, training=self.training)
        if self.training:
            raise NotImplementedError("no training")
        return SimpleNamespace(logits=self.second(x))


def test_looking_for_such_layers_leaves_no_trace():
    model = Stateful()
    model.first.forward = model.first.forward  # as accelerate leaves it
    modes = [module.training for module in model.modules()]
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    own = model.first.forward
    assert read_or_written(model, {"first": model.first, "second": model.second}, IDS) == {}
    assert all(torch.equal(now, before[name]) for name, now in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random) and [module.training for module in model.modules()] == modes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.first.forward is own and "forward" not in vars(model.second)


def test_the_failure_of_a_model_leaves_no_trace_either():
    def fails(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the model's own words")

    model = Net(fails)
    with pytest.raises(RuntimeError, match="the model's own words"):
        quantize(model, [IDS], SCALAR)
    assert type(model.first) is nn.Linear and "forward" not in vars(model.first) and model.training


def test_nothing_is_left_to_quantize():
    seen = pytest.warns(RuntimeWarning, match="not quantized: second")
    with seen, pytest.raises(ValueError, match="no linear layer"):
        quantize(Net(USES["data"]), [IDS], method(), skip=("first",))


class Adapted(nn.Module):
    """As peft wraps a layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_the_matrices_of_an_adapter_stay():
    model = Net()
    model.first = Adapted(model.first)
    helpers = ["first.lora_A.default", "first.lora_B.default"]
    assert left_alone(model) == dict.fromkeys(helpers, HELPER)
    with pytest.warns(RuntimeWarning, match="not quantized: first.lora_A.default, first.lora_B.default; .*adapter"):
        reports = quantize(model, [IDS], SCALAR)
    assert [report.name for report in reports] == ["first.base_layer", "second"]
    assert all(type(model.get_submodule(name)) is nn.Linear for name in helpers)


def test_a_layer_in_two_places_stays_and_is_named():
    model = Net()
    model.again = model.second
    assert left_alone(model) == {"second": SHARED} and [name for name, _ in linear_layers(model)] == ["first"]
    with pytest.warns(RuntimeWarning, match="not quantized: second; their weight is used in two places"):
        quantize(model, [IDS], SCALAR)
    assert model.again is model.second


def llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**shape, image_size=16, patch_size=8),
            text_config=LlamaConfig(**shape, vocab_size=11),
            image_token_index=10,
        )
    )


def test_what_lies_outside_of_the_language_model_stays():
    model = llava()
    tower = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("model.vision_tower", "model.multi_modal_projector"))
    ]
    assert left_alone(model) == dict.fromkeys(tower, OUTSIDE) and len(tower) == 8
    match = "not quantized: model.vision_tower.* and 4 more; no text reaches them"
    with pytest.warns(RuntimeWarning, match=match) as seen:
        reports = quantize(model, [IDS % 10], SCALAR)
    assert len(seen) == 1  # none is rounded without text
    assert len(reports) == 7 and all(report.name.startswith("model.language_model.layers.0") for report in reports)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in tower)
    assert BYPASSED not in left_alone(model).values()
