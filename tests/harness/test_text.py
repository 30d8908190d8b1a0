"""What is checked: the docstring reader against Python's `inspect` (and that it runs no code); that splits
are disjoint, stable and independent of order; that the cache gives the same ids and survives corruption; and that
errors name the remedy."""

import hashlib
import importlib
import inspect
import itertools
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcqat_min.harness import corpus as docstrings
from lcqat_min.harness import text
from lcqat_min.harness import text_cache as cache

texts_strategy = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=30)


class CharTokenizer:
    """One token per character, so that expected ids can be written down; 0 ends a text."""

    eos_token_id = 0

    def __init__(self, shift: int = 0):
        self.shift = shift

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[ord(c) + self.shift for c in t] for t in texts]}

    def get_vocab(self):
        return {chr(i): i + self.shift for i in range(1, 128)}


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """The only source of docstrings: a package of 400 long ones that raises when imported."""
    root = tmp_path / "site" / "fakepackage"
    (root / "tests").mkdir(parents=True)
    functions = [f'def f{i}():\n    """{f"Document {i}. " * 12}"""\n' for i in range(400)]
    (root / "__init__.py").write_text("raise RuntimeError('imported')\n" + "".join(functions))
    (root / "short.py").write_text('"""Too short."""\n')
    (root / "copy.py").write_text(functions[0])
    (root / "broken.py").write_text('"""' + "Never closed. " * 20)
    (root / "tests" / "test_it.py").write_text(f'"""{"A test. " * 30}"""\n')
    (root / "dangling.py").symlink_to(root / "nowhere.py")
    monkeypatch.syspath_prepend(root.parent)
    monkeypatch.setattr(docstrings, "PACKAGES", ("fakepackage", "not_an_installed_package"))
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "empty")})
    return root


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A text file of 3000 paragraphs, long enough for all three splits."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"Paragraph {i} " + "speaks of this and that. " * 8 for i in range(3000)))
    return path


# ------------------------------------------------------------------------------------------- docstrings


def test_docstrings_are_those_that_inspect_finds():
    module = importlib.import_module("textwrap")  # functions, a class and its methods
    members = [module, *vars(module).values(), *vars(module.TextWrapper).values()]
    own = [m for m in members if m is module or getattr(m, "__module__", None) == "textwrap"]
    expected = {inspect.cleandoc(m.__doc__) for m in own if m.__doc__}
    assert len(expected) > 5
    assert set(docstrings.docstrings_of(Path(module.__file__).read_bytes())) == expected


def test_docstrings_of_nested_and_async_definitions():
    source = '"""m"""\nclass A:\n  """a"""\n  async def f(self):\n    """f"""\n    def g():\n      """g"""\n'
    assert set(docstrings.docstrings_of(source)) == {"m", "a", "f", "g"}


@pytest.mark.parametrize("source", [b"def f(:", b"a\0b", b"\xff\xfe", b"(" * 5000, b""])
def test_source_that_does_not_parse_has_no_docstrings(source):
    assert docstrings.docstrings_of(source) == []


def test_half_a_surrogate_pair_is_dropped():
    assert docstrings.docstrings_of(r'"""a\ud800b"""') == ["ab"]


def test_topics_are_the_string_constants():
    assert docstrings.topics_of("topics = {'if': 'The \"if\" statement\\n'\n ' selects.'}") == [
        "if",
        'The "if" statement\nselects.',
    ]


def test_reads_installed_packages_without_importing_them(fake_package):
    found = [t for texts in text.documents("docstrings").values() for t in texts]
    assert sorted(found) == sorted(f"Document {i}. " * 12 for i in range(400))
    assert "fakepackage" not in sys.modules


# ----------------------------------------------------------------------------------------------- splits


@given(texts_strategy, st.randoms(use_true_random=False))
def test_splits_keep_each_text_once_in_any_order(texts, random):
    splits = text.split_by_hash(texts)
    together = [t for part in splits.values() for t in part]
    assert len(together) == len(set(together)) and set(together) == set(texts)
    random.shuffle(texts)
    assert text.split_by_hash(texts) == splits


@given(texts_strategy, texts_strategy)
def test_new_texts_move_no_old_text(old, new):
    before, after = text.split_by_hash(old), text.split_by_hash(old + new)
    for name in text.SPLITS:
        assert [t for t in after[name] if t in set(old)] == before[name]


def test_shares_of_the_splits():
    sizes = {name: len(part) for name, part in text.split_by_hash([str(i) for i in range(20_000)]).items()}
    assert 300 < sizes["validation"] < 500 and 300 < sizes["test"] < 500  # 400 each, five sigma are 99


def test_ids_are_documents_joined_by_end_of_text():
    assert text.encode(["ab", "", "c"], CharTokenizer()).tolist() == [97, 98, 0, 0, 99]
    assert text.encode([], CharTokenizer()).shape == (0,)


def test_local_file_and_folder_give_the_same_ids_as_their_documents(corpus):
    splits = text.load_text(str(corpus), CharTokenizer())
    for name, texts in text.documents(str(corpus)).items():
        assert "".join(map(chr, getattr(splits, name))) == "\0".join(texts)
    words = " ".join(t for part in text.documents(str(corpus)).values() for t in part).split()
    numbers = [int(number) for word, number in itertools.pairwise(words) if word == "Paragraph"]
    assert sorted(numbers) == list(range(3000))  # no paragraph is lost or in two splits
    folder = text.load_text(str(corpus.parent), CharTokenizer())
    assert torch.equal(folder.train, splits.train) and folder.source == str(corpus.parent)


def test_real_tokenizer_restores_the_text():
    transformers = pytest.importorskip("transformers")
    folder = Path(__file__).parents[2] / "models" / "doc-llama"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 4096 and tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    texts = ["def f(x):\n    return x  # größer, 好的\n", "\n\nParameters\n----------\n"]
    ids = text.encode(texts, tokenizer)
    assert tokenizer.decode(ids) == texts[0] + "<|endoftext|>" + texts[1]


# ------------------------------------------------------------------------------------------------ cache


def test_text_in_another_encoding_is_named_rather_than_thinned(tmp_path):
    (tmp_path / "good.txt").write_bytes("caf\u00e9".encode("utf-8-sig"))
    assert text._local_pieces(tmp_path) == ["caf\u00e9"]  # a byte-order mark is no letter
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8 .*iconv"):
        text.load_text(str(tmp_path), CharTokenizer())


def test_cache_gives_the_same_ids_without_reading_again(fake_package, tmp_path, monkeypatch):
    first = text.load_text("docstrings", CharTokenizer(), cache_dir=tmp_path / "cache")
    monkeypatch.setattr(text, "documents", lambda source: pytest.fail("read again"))
    second = text.load_text("docstrings", CharTokenizer(), cache_dir=tmp_path / "cache")
    for name in text.SPLITS:
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert getattr(second, name).dtype == torch.long
    assert len(list((tmp_path / "cache").iterdir())) == 1  # no temporary file is left


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"\xff" * len(b)])
def test_corrupt_cache_is_rebuilt_with_a_note(fake_package, tmp_path, capsys, damage):
    first = text.load_text("docstrings", CharTokenizer(), cache_dir=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = text.load_text("docstrings", CharTokenizer(), cache_dir=tmp_path)
    assert torch.equal(first.train, again.train) and file.read_bytes() == whole
    assert "building it anew" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_a_note(fake_package, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    splits = text.load_text("docstrings", CharTokenizer(), cache_dir=tmp_path / "file" / "cache")
    assert len(splits.train) and "set LCQAT_CACHE to a folder that can be written" in capsys.readouterr().err


def test_a_cache_that_cannot_be_looked_at_is_a_note(fake_package, tmp_path, capsys, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache.Path, "exists", forbidden)  # what it does in another user's home
    splits = text.load_text("docstrings", CharTokenizer(), cache_dir=tmp_path / "cache")
    assert len(splits.train) and "cannot read the cached text" in capsys.readouterr().err


def test_a_user_without_a_home_has_no_cache(fake_package, capsys, monkeypatch):
    def nowhere(path):
        raise RuntimeError("Could not determine home directory.")

    for name in ("LCQAT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache.Path, "expanduser", nowhere)
    assert len(text.load_text("docstrings", CharTokenizer()).train)
    assert "home directory.), so it will be built anew each time; set LCQAT_CACHE" in capsys.readouterr().err


def test_cache_key_follows_tokenizer_and_versions(monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", ("torch",))
    key = cache.fingerprint("docstrings", CharTokenizer())
    assert key == cache.fingerprint("docstrings", CharTokenizer())
    assert key != cache.fingerprint("docstrings", CharTokenizer(shift=1))
    assert key != cache.fingerprint("wikitext2", CharTokenizer())
    monkeypatch.setattr(docstrings.importlib.metadata, "version", lambda name: "999")
    assert key != cache.fingerprint("docstrings", CharTokenizer())


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("LCQAT_CACHE", raising=False)
    assert cache.default_cache() == tmp_path / "xdg" / "lcqat-min"
    monkeypatch.setenv("LCQAT_CACHE", str(tmp_path / "own"))
    assert cache.default_cache() == tmp_path / "own"
    monkeypatch.delenv("LCQAT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_cache() == Path.home() / ".cache" / "lcqat-min"


def test_digest_tells_texts_apart():
    parts = [[1, 2, 300], [4], [5, 70000]]
    expected = hashlib.sha256(b"".join(struct.pack(f"<q{len(ids)}i", len(ids), *ids) for ids in parts)).hexdigest()[:16]
    splits = text.Splits(*map(torch.tensor, parts), "a")
    assert splits.digest == expected == replace(splits, source="b").digest
    moved = text.Splits(*map(torch.tensor, ([1, 2], [300, 4], [5, 70000])), "a")
    assert moved.digest != expected


def test_a_note_says_that_a_text_is_used_more_than_once(capsys):
    splits = text.Splits(torch.arange(8), torch.arange(4), torch.arange(4), "a")
    text.say_if_repeated(splits, 8)
    assert not capsys.readouterr().out
    text.say_if_repeated(splits, 9)
    assert "has 8 training tokens, so 9 use some of it more than once" in capsys.readouterr().out


def test_tokens_that_a_model_does_not_have_are_refused(corpus, tiny_llama):
    assert len(text.load_text(str(corpus), CharTokenizer()).train)
    with pytest.raises(ValueError, match="the train text holds tokens from .*, the model knows 0 to 96"):
        text.load_text(str(corpus), CharTokenizer(), model=tiny_llama())


# -------------------------------------------------------------------------------------------- wikitext2


def test_wikitext_is_joined_by_blank_lines(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {name: {"text": [f"{name} {i}" for i in range(100)]} for name in text.SPLITS}
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: rows)
    splits = text.load_text("wikitext2", CharTokenizer(), cache_dir=tmp_path)
    assert "".join(map(chr, splits.test)) == "\n\n".join(rows["test"]["text"])


def test_wikitext_without_network_names_the_remedy(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")

    def offline(*names):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match="no route.*source='docstrings'.*local text file"):
        text.load_text("wikitext2", CharTokenizer(), cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wikitext_without_its_reader_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match="ModuleNotFoundError.*Install that"):
        text.load_text("wikitext2", CharTokenizer(), cache_dir=tmp_path)


# ----------------------------------------------------------------------------------------------- errors


def test_unknown_source_lists_what_is_accepted():
    with pytest.raises(ValueError, match="'wikitext-3'.*'docstrings', 'wikitext2'.*path"):
        text.load_text("wikitext-3", CharTokenizer())


@pytest.mark.parametrize("content", ["", "\n\n\n", "A short text.\n\nOf two paragraphs."])
def test_too_little_text_says_what_was_got_and_needed(tmp_path, content):
    path = tmp_path / "short.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="got .* for validation.*at least 256.*250 000 characters"):
        text.load_text(str(path), CharTokenizer())


def test_a_folder_without_text_is_named(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="holds no .txt or .md file"):
        text.load_text(str(tmp_path), CharTokenizer())


def test_tokenizer_without_end_of_text():
    tokenizer = CharTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="set tokenizer.eos_token"):
        text.load_text("docstrings", tokenizer)
