"""Folders of models: replaced whole or not at all, other files left alone, and all that a model needs beside it.

Checked: saves that fail or are killed at every step, between one file of weights and several; two saves at once;
shards, their damage and their digest; modes; code of a model's own, processors, settings that transformers refuses to
write; homes, links and odd names.
"""

import copy
import functools
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lcqat_min import QuantConfig, quantize
from lcqat_min.disk.locks import alone
from lcqat_min.packing.atomic_save import write_folder
from lcqat_min.packing.files import export_dense, load_packed, save_packed, to_storage_precision
from lcqat_min.packing.format import tensor_files

TOKENS = torch.arange(2 * 12).view(2, 12) % 97
QUICK = QuantConfig(codebook="scalar", feedback=False, refits=0)
SEVERAL = 6000  # bytes of a shard that cut these models into a few files


@pytest.fixture(scope="module")
def make(tiny_llama) -> Callable[[int], torch.nn.Module]:
    @functools.cache
    def quantized(seed: int) -> torch.nn.Module:
        model = tiny_llama(seed).eval()
        quantize(model, [TOKENS], QUICK)
        to_storage_precision(model)
        return model

    return lambda seed: copy.deepcopy(quantized(seed))


@pytest.fixture
def model(make) -> torch.nn.Module:
    return make(0)


@pytest.fixture
def saved(model, tmp_path) -> Path:
    save_packed(model, tmp_path / "model")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return torch.allclose(logits(one), logits(other), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- replaced whole or not at all


def test_saving_again_replaces_the_model_and_keeps_other_files(model, saved):
    others = [saved / "tokenizer.json", saved / "adapter.safetensors", saved / "checkpoint-5" / "model.safetensors"]
    for other in (*others, saved.with_name("model.old") / "notes.txt", saved.with_name("model.part") / "notes.txt"):
        other.parent.mkdir(exist_ok=True)
        other.write_text("mine")
    (saved / "model-00001-of-00002.safetensors").write_text("stale")
    first = contents(saved)
    save_packed(load_packed(saved), saved)
    second = contents(saved)
    del first["model-00001-of-00002.safetensors"]
    assert first == second  # the same bytes: saving is deterministic
    assert sorted(contents(saved.parent).items() - {(f"model/{k}", v) for k, v in second.items()}) == [
        ("model.old/notes.txt", b"mine"),
        ("model.part/notes.txt", b"mine"),
    ]
    assert "import lcqat_min.hf" in (saved / "README.md").read_text()
    export_dense(model, saved)
    assert sorted(contents(saved)) == sorted(first.keys() - {"README.md"})


class Killed(BaseException):
    pass


def killed(*args) -> None:
    raise Killed


class Steps:
    """Counts what changes files; `last` is the step that raises, and after it all do, if it is a death."""

    CHANGES = (
        (os, "replace"),
        (shutil, "rmtree"),
        (pathlib.Path, "unlink"),
        (pathlib.Path, "rmdir"),
        (pathlib.Path, "mkdir"),
        (pathlib.Path, "write_text"),
    )

    def __init__(self, patch: pytest.MonkeyPatch, last: int | None, death: bool):
        self.done, self.last, self.death = 0, last, death
        for owner, name in self.CHANGES:
            patch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, do: Callable) -> Callable:
        def step(*args, **kwargs):
            self.done += 1
            if self.last is not None and (self.done > self.last if self.death else self.done == self.last + 1):
                raise Killed
            return do(*args, **kwargs)

        return step


@pytest.mark.parametrize("old, new", [(40, "5GB"), ("5GB", 40)])  # two tensors of 40 bytes: two files, or one
@pytest.mark.parametrize("death", [True, False])
def test_a_save_that_ends_at_any_step_leaves_one_model_whole(death, old, new, tiny_llama, tmp_path, monkeypatch):
    model, folder = tiny_llama(), tmp_path / "model"

    def write(place: Path, number: float, complete: Callable = lambda part: None) -> None:
        tensors = {key: torch.full((10,), number) for key in ("a", "b")}
        write_folder(model, tensors, place, torch.float32, complete)

    def loads_as_what_it_says() -> None:
        visible = {name: data for name, data in contents(folder).items() if not name.startswith(".")}
        assert visible in wholes.values() or "config.json" not in visible

    wholes = {}
    for name, number, shard in (("old", 0.0, old), ("new", 1.0, new)):
        monkeypatch.setattr("lcqat_min.packing.atomic_save.SHARD", shard)
        write(tmp_path / name, number)
        (tmp_path / name / "tokenizer.json").write_text("mine")
        wholes[name] = contents(tmp_path / name)
    shutil.copytree(tmp_path / "old", folder)
    with monkeypatch.context() as patch:
        steps = Steps(patch, None, death)
        write(folder, 1.0)
    assert wholes["old"] != wholes["new"] == contents(folder) and steps.done > 15
    ends = set()
    for last in range(steps.done):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "old", folder)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            Steps(patch, last, death)
            write(folder, 1.0)
        loads_as_what_it_says()
        if death:  # and the next one dies while it clears up
            with monkeypatch.context() as patch, pytest.raises(Killed):
                Steps(patch, last % 9, death)
                write(folder, 2.0, killed)
            loads_as_what_it_says()
        with pytest.raises(Killed):  # a save that clears up, but moves nothing
            write(folder, 2.0, killed)
        ends |= {name for name, whole in wholes.items() if contents(folder) == whole} or {f"neither at {last}"}
    assert ends == {"old", "new"}
    write(folder, 1.0)
    assert contents(folder) == wholes["new"]


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "hashlib.file_digest"])
def test_a_save_that_fails_before_its_files_are_whole_changes_nothing(where, make, saved, monkeypatch):
    before = contents(saved)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(where, lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        save_packed(make(1), saved)
    assert contents(saved) == before and names(saved.parent) == ["model"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_first_save_that_was_killed_does_not_bar_the_next(model, tmp_path, monkeypatch):
    child = os.fork()
    if not child:
        monkeypatch.setattr("safetensors.torch.save_file", lambda *args: os.kill(os.getpid(), 9))
        save_packed(model, tmp_path / "model")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9 and names(tmp_path / "model")
    save_packed(model, tmp_path / "model")
    assert names(tmp_path / "model") == ["README.md", "config.json", "generation_config.json", "model.safetensors"]


def test_two_saves_at_once_are_not_mixed(model, saved, make):
    before = contents(saved)
    with alone(saved / ".saving"), pytest.raises(ValueError, match="another process is at work here"):
        save_packed(make(1), saved)
    assert contents(saved) == before


def test_an_interrupted_save_says_where_the_old_files_are(model, saved, monkeypatch):
    whole, before = contents(saved), saved / ".before-save"
    before.mkdir()
    for name in ("README.md", "config.json", "model.safetensors"):
        shutil.move(saved / name, before / name)
    with pytest.raises(FileNotFoundError, match=r"save again, or move the files in .*before-save back"):
        load_packed(saved)
    (saved / "config.json").write_text("{}")  # of somebody who tried to help
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("lcqat_min.packing.files.configure", killed)
        save_packed(model, saved)
    assert contents(saved) == whole


def test_folders_of_something_else_are_left_alone(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    for save in (save_packed, export_dense):
        with pytest.raises(ValueError, match=r"no folder of a model .* give a new or an empty one"):
            save(model, tmp_path)
    assert names(tmp_path) == ["thesis.tex"]


def test_a_model_in_memory_stays_as_it_is_when_its_files_are_replaced(saved, make):
    loaded = load_packed(saved)
    before = logits(loaded)
    save_packed(make(1), saved)
    assert torch.equal(logits(loaded), before) and not same(load_packed(saved), loaded)


# -------------------------------------------------------------------------------------------------- shards


def test_many_tensors_go_into_several_files_and_back_into_one(model, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    bits = save_packed(model, folder)
    monkeypatch.setattr("lcqat_min.packing.atomic_save.SHARD", SEVERAL)
    assert save_packed(model, folder) == bits
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and not (folder / "model.safetensors").exists()
    assert sum(tensor.nbytes for shard in shards for tensor in load_file(shard).values()) == bits.bytes
    for load in (load_packed, AutoModelForCausalLM.from_pretrained):
        assert same(load(folder), model)
    export_dense(load_packed(folder), tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors.index.json").is_file()
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), model)
    monkeypatch.undo()
    save_packed(model, folder)
    assert names(folder) == ["README.md", "config.json", "generation_config.json", "model.safetensors"]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


SHARD_DAMAGE = {
    "missing": (lambda f: tensor_files(f)[1].unlink(), r"model-00002-of-0000\d.safetensors is missing: copy it again"),
    "altered": (lambda f: flip_a_bit(tensor_files(f)[-1]), r"model or its config.json was altered since it was saved"),
    "truncated": (lambda f: os.truncate(tensor_files(f)[0], 9), r"model-00001-of-0000\d.* is truncated or damaged"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), r"model.safetensors is missing"),
    "odd index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), r"does not say where the tensors"),
    "short index": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"x": tensor_files(f)[0].name}})
        ),
        r"is missing, not .*: copy it again|altered since",
    ),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_damaged_shards_are_refused(damage, model, tmp_path, monkeypatch):
    do, message = SHARD_DAMAGE[damage]
    monkeypatch.setattr("lcqat_min.packing.atomic_save.SHARD", SEVERAL)
    save_packed(model, tmp_path / "model")
    do(tmp_path / "model")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_packed(tmp_path / "model")


# -------------------------------------------------------------------------------------- beside the weights


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_all_files_are_as_readable_as_any_new_file(model, tmp_path):
    before = os.umask(0o027)
    try:
        save_packed(model, tmp_path / "model")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()}
    assert set(modes.values()) == {0o640} and len(modes) == 4


MODELING = """
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""
CONFIGURATION = """
from transformers import LlamaConfig
class MineConfig(LlamaConfig):
    model_type = "mine"
"""


def test_code_that_came_with_a_model_is_saved_beside_it(tiny_llama, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    source = tmp_path / "source"
    tiny_llama().save_pretrained(source)
    config = json.loads((source / "config.json").read_text()) | {
        "model_type": "mine",
        "architectures": ["MineForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mine.MineConfig",
            "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
        },
    }
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_mine.py").write_text(MODELING)
    (source / "configuration_mine.py").write_text(CONFIGURATION)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
    quantize(model, [TOKENS], QUICK)
    to_storage_precision(model)
    save_packed(model, tmp_path / "packed")
    export_dense(model, tmp_path / "dense")
    with pytest.raises(
        ValueError,
        match=r"load_packed runs no other.*AutoModelForCausalLM.from_pretrained\('.*packed'"
        r", trust_remote_code=True\)",
    ):
        load_packed(tmp_path / "packed")
    assert "trust_remote_code=True" in (tmp_path / "packed" / "README.md").read_text()
    shutil.rmtree(source)
    for folder in ("packed", "dense"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder, trust_remote_code=True)
        assert type(again).__name__ == "MineForCausalLM" and same(again, model)
        assert {"modeling_mine.py", "configuration_mine.py"} <= set(names(tmp_path / folder))


def test_a_class_of_the_callers_own_is_not_loaded_as_another(model, tmp_path):
    class Mine(type(model)):
        pass

    model.__class__ = Mine
    save_packed(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"code of Mine is not part of transformers.*Mine.from_pretrained\('"):
        load_packed(tmp_path / "model")
    assert same(Mine.from_pretrained(tmp_path / "model"), model)


def test_the_readme_names_the_class_that_reads_the_folder(model, saved, tmp_path):
    from transformers import LlamaForSequenceClassification

    assert "AutoModelForCausalLM.from_pretrained" in (saved / "README.md").read_text()
    model.config.pad_token_id = 0
    classifier = LlamaForSequenceClassification(model.config)
    classifier.model = model.model
    save_packed(classifier, tmp_path / "classifier")
    assert "= LlamaForSequenceClassification.from_pretrained" in (tmp_path / "classifier" / "README.md").read_text()


def test_settings_of_generation_never_cost_the_weights(model, tmp_path):
    model.generation_config.temperature = 0.5  # without do_sample: transformers would not write it
    model.config.top_p = 0.5  # nor this
    for save in (save_packed, export_dense):
        save(model, tmp_path / save.__name__)
        settings = json.loads((tmp_path / save.__name__ / "generation_config.json").read_text())
        assert settings["temperature"] == 0.5
    assert load_packed(tmp_path / "save_packed").generation_config.temperature == 0.5
    for unreadable in ({"num_return_sequences": 3}, {"a": torch.ones(2)}):
        vars(model.generation_config).update(unreadable)
        with pytest.warns(UserWarning, match="generation_config is not saved.*mend it"):
            save_packed(model, tmp_path / "model")
        assert same(load_packed(tmp_path / "model"), model)
        assert "generation_config.json" not in names(tmp_path / "model")


def test_files_of_a_processor_come_along_where_there_are_none(tiny_llama, tmp_path):
    origin, packed, dense = (tmp_path / name for name in ("origin", "packed", "dense"))
    tiny_llama().save_pretrained(origin)
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json"):
        (origin / name).write_text(name)
    model = type(tiny_llama()).from_pretrained(origin)
    quantize(model, [TOKENS], QUICK)
    save_packed(model, packed)
    expected = {name: name for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")}
    assert {name: (packed / name).read_text() for name in expected} == expected
    assert not (packed / "tokenizer.json").exists()
    (packed / "processor_config.json").write_text("mine")
    save_packed(model, packed)
    assert (packed / "processor_config.json").read_text() == "mine"
    export_dense(load_packed(packed), dense)
    assert (dense / "processor_config.json").read_text() == "mine"
    shutil.rmtree(origin)
    save_packed(model, tmp_path / "later")
    assert "processor_config.json" not in names(tmp_path / "later")


# --------------------------------------------------------------------------------------------------- places


def test_a_folder_below_the_home_is_found(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save_packed(model, "~/packed")
    export_dense(load_packed("~/packed"), "~/dense")
    assert names(tmp_path) == ["dense", "packed"]


@pytest.mark.parametrize("place", ["ein Ordner, mit ü und 模型", "link", "dangling"])
def test_odd_names_and_links_are_followed(place, model, tmp_path):
    if place in ("link", "dangling"):
        try:
            (tmp_path / place).symlink_to(tmp_path / "target")
        except OSError:
            pytest.skip("links need a privilege here")
    if place == "link":
        (tmp_path / "target").mkdir()
    save_packed(model, tmp_path / place)
    assert same(load_packed(tmp_path / place), model)
    assert place.startswith("ein") or (tmp_path / place).is_symlink()


def test_an_offloaded_model_is_refused_before_anything_is_written(model, saved, tmp_path):
    model.model.norm.to("meta")
    for save in (save_packed, export_dense):
        with pytest.raises(ValueError, match="'model.norm.weight' is not in memory .*load the model whole"):
            save(model, tmp_path / "new")
    assert names(tmp_path) == ["model"]
