"""Systems: the table, and the whole way of each: quantized, trained, packed to a folder, loaded, trained on.

The example of CONTRIBUTING.md is taken from that page and goes the same way, so a system is one file and one line.
"""

import copy
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lcqat_min import TrainConfig, quantize, train
from lcqat_min.layer import quant_layers
from lcqat_min.packing import bits_per_weight, load_packed, save_packed, to_storage_precision
from lcqat_min.ptq import Method
from lcqat_min.qat import parameter_groups
from lcqat_min.systems import table as systems

ROOT = Path(__file__).resolve().parents[2]
SKIP = ("layers.1", "lm_head", "mlp")
IDS = torch.randint(97, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> str:
    """The system of CONTRIBUTING.md, with its line in the table; the name that it has there."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    line = re.search(r'`("[\w-]+": \("[\w.]+", "\w+", "\w+"\)),`', page)[1]
    entry = eval("{" + line + "}")
    ((name, (module_name, *_)),) = entry.items()
    module = ModuleType(module_name)
    monkeypatch.setitem(sys.modules, module_name, module)
    exec(compile(source, "<example>", "exec"), module.__dict__)
    monkeypatch.setattr(systems, "METHODS", systems.METHODS | entry)
    return name


def test_the_table_names_classes_that_know_their_names():
    for name in systems.METHODS:
        assert issubclass(systems.method_of(name), Method) and systems.layer_of(name).method == name
        assert systems.method_of(name)() == systems.method_of(name)()
    with pytest.raises(ValueError, match="unknown method 'gptq'; this version knows lcqat, trellis, lsq, free-vq"):
        systems.method_of("gptq")


def the_whole_way(name: str, teacher: torch.nn.Module, folder: Path) -> None:
    model, probe = copy.deepcopy(teacher), IDS[:1]
    quantize(model, [IDS], systems.method_of(name)(), skip=SKIP)
    assert {type(layer) for _, layer in quant_layers(model)} == {systems.layer_of(name)}
    start = {key: value.clone() for key, value in model.state_dict().items()}
    history = train(model, [IDS] * 4, TrainConfig(4, log_every=1), teacher)
    assert history[-1]["loss"] < history[0]["loss"]
    kinds = {id(group["params"][0]): group["group"] for group in parameter_groups(model, TrainConfig(4))}
    for layer_name, layer in quant_layers(model):
        assert all(kinds[id(getattr(layer, key))] == kind for key, (kind, _) in layer.units().items())
        assert not torch.equal(layer.row_scale, start[f"{layer_name}.row_scale"])
    to_storage_precision(model)
    with torch.no_grad():
        expected = model.eval()(input_ids=probe).logits
    bits = save_packed(model, folder)
    assert 2.0 < bits.per_weight == bits_per_weight(model).per_weight < 8
    for trainable in (False, True):
        back = load_packed(folder, trainable=trainable)
        with torch.no_grad():
            torch.testing.assert_close(back(input_ids=probe).logits, expected, rtol=1e-3, atol=1e-3)
    for layer_name, layer in quant_layers(back):
        assert torch.equal(layer.indices(), model.get_submodule(layer_name).indices())
        assert layer.settings() == model.get_submodule(layer_name).settings()
    train(back, [IDS], TrainConfig(1), teacher)


@pytest.mark.parametrize("name", systems.METHODS)
def test_the_whole_way_of_every_system(name, tiny_llama, tmp_path):
    the_whole_way(name, tiny_llama().eval(), tmp_path / "model")


def test_the_whole_way_of_the_example(example, tiny_llama, tmp_path):
    the_whole_way(example, tiny_llama().eval(), tmp_path / "model")


def test_the_example_is_short():
    source = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len([line for line in source.splitlines() if line.strip()]) <= 30
