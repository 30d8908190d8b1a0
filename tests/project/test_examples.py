"""The examples run as their first lines say, on a tiny model and offline, and do what they promise.

Checked: the folder of own_model.py loads and is nearer to the unquantized model than it was before training; the
Trainer takes the same steps as lcqat_min.qat.loop; the folder for the hub holds all that a reader needs, and nothing
goes to the hub unless that is asked for.

    pytest tests/project/test_examples.py
"""

import contextlib
import copy
import importlib.util
import io
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, TrainingArguments

from lcqat_min import LCQAT, TrainConfig, quantize, train
from lcqat_min.packing.files import load_packed

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WITHOUT_A_GPU = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}


def example(name: str):
    """A file of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *args: object) -> None:
    example(name).main([str(arg) for arg in args])


def kl_printed(text: str) -> list[float]:
    """The two numbers that an example prints, before and after."""
    before, after = (float(number) for number in re.findall(r"\b(\d\.\d{4}) (?:once|as|before|after)\b", text))
    return [before, after]


@pytest.fixture(scope="module")
def made(place) -> tuple[Path, str]:
    """The folder that own_model.py writes, and what it prints."""
    said, out = io.StringIO(), place / "made" / "packed"
    out.parent.mkdir()
    with contextlib.redirect_stdout(said):
        run("own_model", place / "model", place / "text.txt", out, "--steps", 12)
    return out, said.getvalue()


@pytest.fixture
def packed(made) -> Path:
    return made[0]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 33)[None]).logits


def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"own_model", "trainer", "upload"}


def test_a_model_of_your_own(place, made):
    packed, said = made
    before, after = kl_printed(said)
    assert after < before
    assert load_packed(packed).dtype == torch.bfloat16
    assert tokenizer(packed).get_vocab() == tokenizer(place / "model").get_vocab()
    assert [path.name for path in packed.parent.iterdir()] == ["packed"]  # the checkpoint is gone


@pytest.mark.parametrize("name", ["own_model", "trainer", "upload"])
def test_a_folder_that_exists_is_refused_before_the_work(name, tmp_path, capsys):
    """The other arguments name nothing: whoever looked at them first would complain of those."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    args = {
        "own_model": ["no-model", "no-text", tmp_path / "out"],
        "trainer": ["no", "no", "no", tmp_path / "out"],
        "upload": ["no", tmp_path / "out", "me/mine", "--base", "you/yours", "--license", "mit"],
    }
    with pytest.raises(SystemExit):
        run(name, *args[name])
    assert "exists already: give a new folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_trainer_goes_on_from_a_packed_folder(place, packed, tmp_path, capsys):
    run("trainer", packed, place / "model", place / "text.txt", tmp_path / "out", "--steps", 12)
    before, after = kl_printed(capsys.readouterr().out)
    assert after < before
    trained = load_packed(tmp_path / "out")
    assert trained.dtype == load_packed(packed).dtype
    assert not torch.equal(logits(trained), logits(load_packed(packed)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_trainer_takes_the_steps_of_our_own_loop(tiny_llama, tmp_path):
    """Three steps on all windows at once, whose order then does not matter; also in two halves each."""
    teacher, windows = tiny_llama(), torch.arange(128).view(4, 32) * 7 % 97
    start = copy.deepcopy(teacher)
    quantize(start, [windows], LCQAT(codebook="lattice"))
    ours = copy.deepcopy(start)
    train(ours, [windows] * 3, TrainConfig(3), teacher)
    moved = (logits(ours) - logits(start)).norm()
    for size, halves in ((4, 1), (2, 2)):
        theirs = copy.deepcopy(start)
        arguments = TrainingArguments(
            tmp_path, max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=halves, **WITHOUT_A_GPU
        )
        example("trainer").DistillationTrainer(theirs, teacher, windows, arguments).train()
        assert (logits(theirs) - logits(ours)).norm() < 0.005 * moved


class Hub:
    """Stands for HfApi: remembers what was asked of it."""

    def __init__(self):
        self.asked: list[tuple[str, dict]] = []

    def __getattr__(self, name: str):
        return lambda *args, **named: self.asked.append((name, named))


@pytest.mark.parametrize("push", [False, True])
def test_a_folder_for_the_hub(packed, tmp_path, monkeypatch, push):
    hub, upload = Hub(), example("upload")
    monkeypatch.setattr(upload, "HfApi", lambda: hub)
    (packed / "notes.txt").write_text("private")
    args = [packed, tmp_path / "out", "me/mine", "--base", "you/yours", "--license", "apache-2.0"]
    upload.main([str(arg) for arg in args] + ["--push"] * push)
    _, header, text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(header)
    assert (card["license"], card["base_model"]) == ("apache-2.0", "you/yours")
    for part in ("import lcqat_min.hf", '.from_pretrained("me/mine")', "codebooks", "`you/yours`"):
        assert part in text
    assert torch.equal(logits(load_packed(tmp_path / "out")), logits(load_packed(packed)))
    assert tokenizer(tmp_path / "out").get_vocab() == tokenizer(packed).get_vocab()
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert [name for name, _ in hub.asked] == ["whoami", "create_repo", "upload_folder"] * push
    assert not push or hub.asked[1][1]["private"] and hub.asked[2][1]["folder_path"] == tmp_path / "out"


def test_a_damaged_model_is_not_made_ready(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="model.safetensors"):
        run("upload", tmp_path / "damaged", tmp_path / "out", "me/mine", "--base", "you/yours", "--license", "mit")
    assert not (tmp_path / "out").exists()
