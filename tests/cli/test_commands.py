"""quantize, train, export, generate, bits: from a model's folder to packed files and back, through the command line.

pytest tests/cli/test_commands.py
"""

import io
import sys

import pytest
import torch

from lcqat_min.cli import commands
from lcqat_min.cli import main as cli
from lcqat_min.disk.whole_file import alone
from lcqat_min.errors import UsageError
from lcqat_min.harness.models import BUNDLED, load
from lcqat_min.layer.linear import quant_layers
from lcqat_min.layer.stored import codebook_of
from lcqat_min.packing.files import load_packed, save_packed
from lcqat_min.packing.layer import PackedLinear
from lcqat_min.ptq.lcqat import LCQAT
from lcqat_min.ptq.model import quantize
from lcqat_min.qat import checkpoint
from lcqat_min.systems.free_vq import FreeVQ


@pytest.fixture(scope="module")
def packed(place):
    """The packed folder that `quantize` writes."""
    args = ["--model", place / "model", "--text", place / "text.txt", "--tokens", 512, "--set", "codebook=lattice"]
    assert call("quantize", *args, "--out", place / "packed") == 0
    return place / "packed"


def call(*args):
    return cli.main([str(arg) for arg in args])


def test_the_way_there_and_back(place, packed, capsys):
    args = ("--teacher", place / "model", "--text", place / "text.txt", "--tokens", 2048, "--out", place / "trained")
    assert call("train", packed, *args) == 0
    assert "->" in capsys.readouterr().out
    assert call("export", place / "trained", "--out", place / "dense") == 0
    ids = torch.arange(1, 9)[None]
    dense, _ = load(place / "dense")
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits for model in (load_packed(place / "trained"), dense))
    assert (ours - theirs).abs().max() < 1e-5
    texts = []
    for folder in (place / "trained", place / "dense"):
        assert call("generate", folder, "--tokens", 5) == 0
        texts.append(capsys.readouterr().out.splitlines()[-1])
    assert texts[0] == texts[1]


def beside_codes(model: torch.nn.Module) -> torch.Tensor:
    """How far each latent is from its digit, in bins."""
    layers = [layer for _, layer in quant_layers(model)]
    centres = [0.0 if layer.levels == 2 else (layer.levels - 1) / 2 for layer in layers]
    gaps = [layer.latent - layer.digits().view_as(layer.latent) - at for layer, at in zip(layers, centres, strict=True)]
    return torch.cat([gap.detach().flatten().abs() for gap in gaps])


@pytest.mark.parametrize("codebook", ["planes", "lattice"])
def test_training_from_a_folder_starts_on_the_codes_and_in_python_beside_them(codebook, tiny_llama, tmp_path, capsys):
    model = tiny_llama()
    quantize(model, [torch.arange(64).view(2, 32)], LCQAT(codebook=codebook))
    assert (beside_codes(model) > 0.001).float().mean() > 0.9
    save_packed(model, tmp_path / "packed")
    again = load_packed(tmp_path / "packed", trainable=True)
    assert beside_codes(again).max() == 0
    with pytest.raises(SystemExit):
        call("train", "--help")
    assert "training starts with each latent on its code" in " ".join(capsys.readouterr().out.split())


def test_a_model_is_saved_in_the_precision_it_came_in(place, tmp_path, capsys):
    model, tokenizer = load(place / "model")
    for part in (model.bfloat16(), tokenizer):
        part.save_pretrained(tmp_path / "half")
    args = ["--model", tmp_path / "half", "--text", place / "text.txt", "--tokens", 512, "--set", "codebook=lattice"]
    assert call("quantize", *args, "--out", tmp_path / "packed") == 0
    args = ["--teacher", tmp_path / "half", "--text", place / "text.txt", "--tokens", 1024]
    assert call("train", tmp_path / "packed", *args, "--out", tmp_path / "trained") == 0
    for folder in ("packed", "trained"):
        assert load_packed(tmp_path / folder).dtype == torch.bfloat16
    assert call("bits", tmp_path / "half") == 0
    assert "16.0000 bits per weight" in capsys.readouterr().out


def test_bits_of_packed_and_plain(place, packed, capsys):
    assert call("bits", packed) == 0
    assert "bits per weight" in capsys.readouterr().out
    assert call("bits", place / "model") == 0
    assert "32.0000 bits per weight" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["quantize", "train", "export"])
def test_a_folder_that_exists_is_left_alone(place, packed, capsys, command):
    before = sorted((path.name, path.stat().st_size) for path in packed.iterdir())
    args = ["--model", place / "model"] if command == "quantize" else [packed]
    assert call(command, *args, "--out", packed) == 2
    assert "exists already" in capsys.readouterr().err
    assert before == sorted((path.name, path.stat().st_size) for path in packed.iterdir())


def test_a_plain_folder_is_no_packed_one(place, capsys):
    assert call("export", place / "model", "--out", place / "nothing") == 2
    assert str(place / "model") in capsys.readouterr().err and not (place / "nothing").exists()


def test_a_packed_folder_is_no_model_to_quantize(place, packed, capsys):
    for command, *out in (("quantize", "--out", place / "nothing"), ("compare",)):
        assert call(command, "--model", packed, "--text", place / "text.txt", *out) == 2
        assert "is quantized already" in capsys.readouterr().err


def test_a_model_in_half_precision_without_a_tokenizer(place, packed, tmp_path, capsys):
    save_packed(load_packed(packed).bfloat16(), tmp_path / "half")
    assert call("bits", tmp_path / "half") == 0
    data = ("--teacher", place / "model", "--text", place / "text.txt", "--tokens", 1024, "--out", tmp_path / "out")
    assert call("train", tmp_path / "half", *data) == 2
    assert "holds no tokenizer that can be read: tokenizer.save_pretrained(" in capsys.readouterr().err
    load(place / "model")[1].save_pretrained(tmp_path / "half")
    assert call("train", tmp_path / "half", *data) == 0
    capsys.readouterr()
    assert call("generate", tmp_path / "out", "--prompt", "") == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_damaged_configurations_and_places_that_cannot_be_written_are_named(place, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert call("bits", tmp_path) == 2
    assert "config.json is truncated or damaged" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert call("quantize", "--model", place / "model", "--out", tmp_path / "file" / "q") == 2
    assert f"cannot write to {tmp_path / 'file' / 'q'}" in capsys.readouterr().err


def test_a_model_whose_tokenizer_is_missing_is_refused(tiny_gpt2, place, tmp_path, capsys):
    tiny_gpt2().save_pretrained(tmp_path / "model")
    args = ("--model", tmp_path / "model", "--text", place / "text.txt", "--out", tmp_path / "out")
    assert call("quantize", *args) == 2
    assert "its files are missing. tokenizer.save_pretrained" in capsys.readouterr().err


def test_what_is_skipped_is_told(place, tmp_path, capsys):
    args = ("--model", place / "model", "--text", place / "text.txt", "--tokens", 512, "--set", "codebook=scalar")
    assert call("quantize", *args, "--skip", "down_porj", "--out", tmp_path / "out") == 2
    assert "--skip down_porj: part of no linear layer's name" in capsys.readouterr().err
    assert call("quantize", *args, "--skip", "down_proj", "--out", tmp_path / "out") == 0
    assert "of the weights, embeddings and head not counted, stay as they are" in capsys.readouterr().out


def test_a_teacher_from_far_away_and_a_run_that_goes_on_are_told(place, packed, tmp_path, capsys, monkeypatch):
    stranger, tokenizer = load(place / "model")
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter.copy_(parameter.flip(0) * 3)
    stranger.save_pretrained(tmp_path / "stranger")
    tokenizer.save_pretrained(tmp_path / "stranger")
    monkeypatch.setattr(commands, "FAR", 0.0)
    data = ("--text", place / "text.txt", "--tokens", 2048)
    args = ("--teacher", tmp_path / "stranger", *data, "--out", tmp_path / "out")
    save, steps = checkpoint.save, []

    def interrupted(*args):
        save(*args)
        steps.append(args[-1]["step"])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        assert call("train", packed, *args) == 130
    found = capsys.readouterr()
    assert "Was it made from another (--teacher)?" in found.out and "last checkpoint" in found.err
    assert call("train", packed, *args, "--seed", 1) == 2 == call("train", packed, *args, "--tokens", 4096)
    assert "is of a run with other settings (seed was 0, is 1): give those, or remove it" in capsys.readouterr().err
    other = load_packed(packed, trainable=True)
    next(layer for _, layer in quant_layers(other)).row_scale.data *= 2
    save_packed(other, tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    assert call("train", tmp_path / "other", *args) == 2
    assert "is of a run with other settings (model was " in capsys.readouterr().err
    assert call("train", packed, *args) == 0
    assert "going on from" in capsys.readouterr().out and steps == [1]
    assert not list(tmp_path.glob("out.checkpoint*"))


def test_a_context_shorter_than_the_window_is_kept_to(tiny_llama):
    model = tiny_llama()
    assert commands._window(model) == 256
    model.config.max_position_embeddings = 64
    assert commands._window(model) == 64


@pytest.fixture(scope="module")
def short(place):
    """The folder of a GPT-2 that knows 16 positions in a table, with the bundled tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=4096, n_embd=16, n_inner=24, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(place / "short")
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(place / "short")
    return place / "short"


def test_a_model_that_reads_few_positions_goes_all_the_way(short, place, tmp_path, capsys, monkeypatch):
    args = ("--text", place / "text.txt", "--tokens", 128)
    assert call("quantize", "--model", short, *args, "--set", "codebook=scalar", "--out", tmp_path / "q") == 0
    assert call("train", tmp_path / "q", "--teacher", short, *args, "--out", tmp_path / "t") == 0
    capsys.readouterr()
    assert call("generate", tmp_path / "t") == 0
    assert "new tokens instead of 40, since the model cannot read more" in capsys.readouterr().err
    prompt = "Return the array " * 20
    assert call("generate", tmp_path / "t", "--prompt", prompt) == 2
    assert "the model reads 16, new ones included: shorten it" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert call("compare", "--model", short, *args, "--methods", "rtn") == 0
    assert "window=16" in (out := capsys.readouterr().out) and "  rtn " in out
    assert call("compare", "--model", short, *args, "--methods", "rtn", "--prompt", prompt) == 2
    assert "shorten it" in capsys.readouterr().err and len(list(tmp_path.glob("runs/*"))) == 1


def test_home_is_written_out_in_every_path(place, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, source in (("model", place / "model"), ("text.txt", place / "text.txt"), ("p", packed)):
        (tmp_path / name).symlink_to(source)
    args = ("--text=~/text.txt", "--tokens=512")
    assert call("quantize", "--model=~/model", *args, "--set=codebook=scalar", "--out=~/q") == 0
    assert call("train", "~/p", "--teacher=~/model", *args, "--out=~/t") == 0
    assert call("export", "~/t", "--out=~/e") == 0 == call("bits", "~/e") == call("generate", "~/q", "--tokens=1")
    for folder in "qte":
        assert (tmp_path / folder / "config.json").is_file() and (tmp_path / folder / "tokenizer.json").is_file()
    assert not (tmp_path / "~").exists() and load("~/model")[0].config.hidden_size == 16


def test_a_tokenizer_that_is_not_saved_and_a_measurement_that_fails_are_notes(
    place, packed, tmp_path, monkeypatch, capsys
):
    def broken(*args, **kwargs):
        raise RuntimeError("out of order")

    measure, calls = commands.kl_to, []
    monkeypatch.setattr(type(load(place / "model")[1]), "save_pretrained", broken)
    monkeypatch.setattr(commands, "_say_what_is_left", lambda model: (tmp_path / "q" / "config.json").stat())
    monkeypatch.setattr(commands, "kl_to", lambda *args: broken() if calls else calls.append(0) or measure(*args))
    args = ("--text", place / "text.txt", "--tokens", 512)
    assert call("quantize", "--model", place / "model", *args, "--set", "codebook=scalar", "--out", tmp_path / "q") == 0
    assert call("train", packed, "--teacher", place / "model", *args, "--out", tmp_path / "t") == 0
    assert call("export", packed, "--out", tmp_path / "e") == 0
    err = capsys.readouterr().err
    assert err.count("is stored without its tokenizer") == 3 and "was not measured (RuntimeError: out of order)" in err
    assert all((tmp_path / folder / "model.safetensors").is_file() for folder in "qte")
    assert not list(tmp_path.glob("t.checkpoint*"))


def test_a_console_of_few_letters_shows_the_others_as_escapes(place, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert call("generate", place / "model", "--prompt", "na\u00efve", "--tokens", 1) == 0
    console.flush()
    assert b"na\\xefve" in console.buffer.getvalue()


def test_a_prompt_that_was_not_decoded_and_a_file_that_is_no_model_are_named(place, capsys):
    assert call("generate", place / "model", "--prompt", "na\udcefve") == 2
    assert r"the prompt 'na\udcefve' is not text" in capsys.readouterr().err
    assert call("generate", place / "text.txt") == 2
    assert "text.txt: give the folder that save_pretrained wrote" in capsys.readouterr().err


def test_two_processes_do_not_make_one_folder(place, packed, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    with alone(tmp_path / "out"):
        for args in (("quantize", "--model", place / "model"), ("train", packed), ("export", packed)):
            assert call(*args, *out) == 2
            assert "another process is at work" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_words_than_the_model_is_refused(place, tmp_path, capsys, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    load(place / "model")[1].save_pretrained(tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    args = ("--model", tmp_path / "small", "--text", place / "text.txt")
    out = ("--out", tmp_path / "out")
    for command in (("quantize", *args, *out), ("compare", *args), ("generate", tmp_path / "small")):
        assert call(*command) == 2
        assert "the model knows 0 to 299" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        (("compare", "--seeds"), "expected at least one argument"),
        (("compare", "--seeds", "-1"), "'-1' is not a whole number of at least 0"),
        (("compare", "--seeds", 2**64), "at most 9223372036854775807"),
        (("quantize", "--out", "q", "--seed", "0.5"), "'0.5' is not a whole number"),
        (("quantize", "--out", ""), "nothing was given"),
        (("quantize", "--out", "q", "--skip", ""), "nothing was given"),
        (("compare", "--model", " "), "nothing was given"),
        (("compare", "--text", ""), "nothing was given"),
        (("bits", "~no-such-user/q"), "names no home folder that is known here"),
    ],
)
def test_values_that_mean_nothing_are_refused(args, message, capsys):
    with pytest.raises(SystemExit):
        call(*args)
    assert message in capsys.readouterr().err


def test_the_largest_seed_works(place, tmp_path):
    args = ("--model", place / "model", "--text", place / "text.txt", "--tokens", 512, "--set", "codebook=planes")
    assert call("quantize", *args, "--seed", 2**63 - 1, "--out", tmp_path / "out") == 0
    assert (
        call(
            "train",
            tmp_path / "out",
            "--teacher",
            place / "model",
            *args[2:6],
            "--seed",
            2**63 - 1,
            "--out",
            tmp_path / "t",
        )
        == 0
    )


def test_a_full_disk_is_one_line(place, tmp_path, capsys, monkeypatch):
    from safetensors import SafetensorError

    def full(*more, **named):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    args = ("--model", place / "model", "--text", place / "text.txt", "--tokens", 512, "--set", "codebook=scalar")
    assert call("quantize", *args, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "lcqat: I/O error: No space left on device"
    assert not (tmp_path / "out").exists()


def test_tokens_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        call("compare", "--tokens", "0")
    assert "at least 1" in capsys.readouterr().err


def test_settings_of_a_method_are_read_by_their_types():
    assert commands.method_with("lcqat", ["codebook=lattice", "dim=2", "feedback=False", "damping=0.1"]) == LCQAT(
        codebook="lattice", dim=2, feedback=False, damping=0.1
    )
    assert commands.method_with("free-vq", ["dim=2"]) == FreeVQ(dim=2)
    for wrong in ("colour=red", "dim=two", "feedback=yes", "dim"):
        with pytest.raises(UsageError, match=rf"--set {wrong}: the settings of lcqat .* rotate=both, .* dim=4"):
            commands.method_with("lcqat", [wrong])


@pytest.mark.parametrize(
    ("options", "rates"), [(["--bits", "3"], {3.0}), (["--bits", "2.25"], None), (["--bits", "2", "--mixed"], None)]
)
def test_bits_of_the_command_line_are_never_exceeded(place, tmp_path, capsys, options, rates):
    args = ["--model", place / "model", "--text", place / "text.txt", "--tokens", 64, "--method", "trellis"]
    assert call("quantize", *args, *options, "--out", tmp_path / "q") == 0
    layers = [layer for layer in load_packed(tmp_path / "q").modules() if isinstance(layer, PackedLinear)]
    books = [codebook_of(layer.stored()) for layer in layers]
    sizes = [layer.in_features * layer.out_features for layer in layers]
    found = [(book.bits / book.dim, size) for book, size in zip(books, sizes, strict=True)]
    assert sum(rate * size for rate, size in found) <= float(options[1]) * sum(size for _, size in found)
    assert rates is None or {rate for rate, _ in found} == rates
    assert ("at most" in capsys.readouterr().out) == (rates is None)


def test_bits_that_a_method_does_not_have(place, tmp_path, capsys):
    args = ["--model", place / "model", "--text", place / "text.txt", "--out", tmp_path / "q"]
    assert call("quantize", *args, "--method", "lsq", "--bits", "3") == 2
    assert call("quantize", *args, "--method", "trellis", "--bits", "0.5") == 2
    said = capsys.readouterr().err
    assert "lsq" in said and "0.5" in said and not (tmp_path / "q").exists()
