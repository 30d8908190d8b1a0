"""Folders of models: replaced whole or not at all, the user's files kept, and all that a model needs beside it.

Checked: saves that fail or are killed at every step, between one file of weights and several; two saves at once;
refusals; shards and their damage; modes; code of a model's own, generation settings that transformers
refuses to write; homes, links and unusual names.
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
from kinds import method
from safetensors.torch import load_file

from lcqat_min import quantize
from lcqat_min.disk.whole_file import alone
from lcqat_min.packing import export_dense, load_packed, save_packed, to_storage_precision
from lcqat_min.packing.atomic_save import TITLE, write_folder

TOKENS = torch.arange(2 * 12).view(2, 12) % 97
QUICK = method("scalar", feedback=False, refits=0)
SHARD_SIZE = "lcqat_min.packing.atomic_save.SHARD_SIZE"
SEVERAL = 6000  # bytes per shard that cut these models into a few files
OWN = ["README.md", "config.json", "generation_config.json", "model.safetensors"]


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
    others = ["tokenizer.json", "adapter.safetensors", "checkpoint-5/model.safetensors", "../model.before/notes.txt"]
    for other in others:
        (saved / other).parent.mkdir(exist_ok=True)
        (saved / other).write_text("mine")
    (saved / "model-00001-of-00002.safetensors").write_text("stale")
    first = contents(saved)
    save_packed(load_packed(saved), saved)
    del first["model-00001-of-00002.safetensors"]
    assert contents(saved) == first  # the same bytes: saving is deterministic
    assert (saved / others[-1]).read_text() == "mine" and names(saved.parent) == ["model", "model.before"]
    assert TITLE in (saved / "README.md").read_text()
    export_dense(model, saved)
    assert sorted(contents(saved)) == sorted(first.keys() - {"README.md"})
    (saved / "README.md").write_text("# Mine")
    save_packed(model, saved)
    assert (saved / "README.md").read_text() == "# Mine"


class Killed(BaseException):
    pass


class Steps:
    """Counts what changes files. Step number `last` raises; if it is a death, all steps after it raise too."""

    CHANGES = [(shutil, "rmtree"), (os, "replace")]
    CHANGES += [(pathlib.Path, name) for name in ("rename", "replace", "rmdir", "mkdir", "unlink", "write_text")]

    def __init__(self, patch: pytest.MonkeyPatch, last: int | None, death: bool):
        self.done, self.last, self.death = 0, last, death
        for owner, name in self.CHANGES:
            patch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, do: Callable) -> Callable:
        def step(*args, **kwargs):
            self.done += 1
            if self.last is not None and (self.done > self.last if self.death else self.done == self.last + 1):
                if do.__name__ == "rmtree" and args[0].is_dir():  # it gets as far as one file
                    next((file.unlink() for file in args[0].iterdir() if file.is_file()), None)
                raise Killed
            return do(*args, **kwargs)

        return step


USERS = {"tokenizer.json": b"mine", "checkpoint-5/state": b"mine", "README.md": b"# Mine"}


@pytest.mark.parametrize("old, new", [(40, "5GB"), ("5GB", 40)])  # two tensors of 40 bytes: two files, or one
@pytest.mark.parametrize("death", [True, False])
def test_a_save_that_ends_at_any_step_loses_nothing(death, old, new, tiny_llama, tmp_path, monkeypatch):
    model, folder, before = tiny_llama(), tmp_path / "model", tmp_path / "model.before-save"

    def write(place: Path, number: float) -> None:
        write_folder(model, {key: torch.full((10,), number) for key in ("a", "b")}, place, "ours")

    def killed_at(last: int, death: bool) -> bool:
        with monkeypatch.context() as patch:
            Steps(patch, last, death)
            try:
                write(folder, 1.0)
            except Killed:
                return True
        return False

    def models() -> dict[str, bytes]:
        return {name: data for name, data in contents(folder).items() if name not in USERS}

    wholes = []
    for name, number, size in (("old", 0.0, old), ("new", 1.0, new)):
        monkeypatch.setattr(SHARD_SIZE, size)
        write(tmp_path / name, number)
        (tmp_path / name / "README.md").unlink()
        wholes.append(contents(tmp_path / name))
        for file, data in USERS.items():
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / file).write_bytes(data)
    with monkeypatch.context() as patch:
        shutil.copytree(tmp_path / "old", folder)
        steps = Steps(patch, None, death)
        write(folder, 1.0)
    assert models() == wholes[1] and steps.done > 10
    found = []
    for last in range(steps.done):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        assert killed_at(last, death)
        if folder.is_dir():
            found.append(wholes.index(models()))
        else:  # between the two renames
            assert death and contents(before).items() >= wholes[0].items()
            with pytest.raises(FileNotFoundError, match=r"a save was interrupted: rename .*model.before-save back"):
                load_packed(folder)
        if death and last % 3 == 0:  # the next one is killed early, while it recovers
            killed_at(last % 5, death)
        with monkeypatch.context() as patch, pytest.raises(OSError):  # and one that fails later changes nothing more
            patch.setattr("safetensors.torch.save_file", lambda *_, **__: os.stat(tmp_path / "none"))
            write(folder, 2.0)
        assert models() in wholes and contents(folder).items() >= USERS.items(), last
        assert names(tmp_path) == ["model", "new", "old"]
    assert set(found) == {0, 1}
    write(folder, 1.0)
    assert contents(folder) == wholes[1] | USERS


def test_an_empty_folder_that_was_made_after_a_kill_does_not_hide_the_model(model, saved, monkeypatch):
    whole = contents(saved)
    saved.rename(saved.with_name("model.before-save"))
    saved.mkdir()
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("safetensors.torch.save_file", lambda *_, **__: os.stat(saved / "none"))
        save_packed(model, saved)
    assert contents(saved) == whole and names(saved.parent) == ["model"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_was_killed_does_not_bar_the_next_save(model, tmp_path, monkeypatch):
    child = os.fork()
    if not child:
        monkeypatch.setattr("safetensors.torch.save_file", lambda *_, **__: os.kill(os.getpid(), 9))
        save_packed(model, tmp_path / "model")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9 and "model.saving" in names(tmp_path)
    save_packed(model, tmp_path / "model")
    assert names(tmp_path / "model") == OWN and names(tmp_path) == ["model"]


def test_two_saves_at_once_are_not_mixed(saved, make):
    before = contents(saved)
    with alone(saved.with_name("model.saving")), pytest.raises(ValueError, match="another process is at work here"):
        save_packed(make(1), saved)
    assert contents(saved) == before


@pytest.mark.parametrize("save", [save_packed, export_dense])
@pytest.mark.parametrize("place", ["thesis", "file", "current"])
def test_other_places_are_refused_and_left_alone(save, place, model, tmp_path, monkeypatch):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "current").mkdir()
    for file in ("thesis/chapter.tex", "file", "current/config.json"):
        (tmp_path / file).write_text("mine")
    monkeypatch.chdir(tmp_path / "current")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"current folder, or has no config.json of a model: give a new or empty one"):
        save(model, tmp_path / place)
    assert contents(tmp_path) == before and names(tmp_path) == ["current", "file", "thesis"]


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
    monkeypatch.setattr(SHARD_SIZE, SEVERAL)
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
    assert names(folder) == OWN


SHARD_DAMAGE = {
    "missing": (lambda shards: shards[1].unlink(), "model-00002-of-0000"),
    "truncated": (lambda shards: os.truncate(shards[0], 9), "model-00001-of-0000.* is truncated or damaged"),
    "no index": (lambda shards: shards[0].with_name("model.safetensors.index.json").unlink(), "model.safetensors"),
    "short index": (
        lambda shards: (
            shards[0]
            .with_name("model.safetensors.index.json")
            .write_text(json.dumps({"metadata": {}, "weight_map": {"x": shards[0].name}}))
        ),
        "is missing, not .*: copy it again",
    ),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_damaged_shards_are_refused(damage, model, tmp_path, monkeypatch):
    do, message = SHARD_DAMAGE[damage]
    monkeypatch.setattr(SHARD_SIZE, SEVERAL)
    save_packed(model, tmp_path / "model")
    do(sorted((tmp_path / "model").glob("model-*.safetensors")))
    with pytest.raises((ValueError, OSError), match=message):
        load_packed(tmp_path / "model")


# -------------------------------------------------------------------------------------- beside the weights


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_all_files_are_as_readable_as_any_new_file(model, tmp_path):
    before = os.umask(0o027)
    try:
        save_packed(model, tmp_path / "model")
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()} == dict.fromkeys(
        OWN, 0o640
    )


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
    with pytest.raises(ValueError, match=r"code of MineForCausalLM is not part .* load .*packed as its README.md says"):
        load_packed(tmp_path / "packed")
    readme = (tmp_path / "packed" / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)' in readme
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
    with pytest.raises(ValueError, match=r"code of Mine is not part of transformers.*as its README.md says"):
        load_packed(tmp_path / "model")
    assert "model = Mine.from_pretrained" in (tmp_path / "model" / "README.md").read_text()
    assert same(Mine.from_pretrained(tmp_path / "model"), model)


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
        with pytest.warns(UserWarning, match="generation_config is not saved.*correct it"):
            save_packed(model, tmp_path / "model")
        assert same(load_packed(tmp_path / "model"), model)
        assert "generation_config.json" not in names(tmp_path / "model")


# --------------------------------------------------------------------------------------------------- places


def test_a_folder_below_the_home_is_found(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save_packed(model, "~/packed")
    export_dense(load_packed("~/packed"), "~/dense")
    assert names(tmp_path) == ["dense", "packed"]


@pytest.mark.parametrize("place", ["ein Ordner, mit ü und 模型", "link", "dangling"])
def test_unusual_names_and_links_are_followed(place, model, tmp_path):
    if place in ("link", "dangling"):
        try:
            (tmp_path / place).symlink_to(tmp_path / "target")
        except OSError:
            pytest.skip("links need a privilege here")
    if place == "link":
        (tmp_path / "target").mkdir()
    for _ in range(2):
        save_packed(model, tmp_path / place)
        assert same(load_packed(tmp_path / place), model)
    assert place.startswith("ein") or (tmp_path / place).is_symlink()
