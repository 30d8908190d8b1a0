"""Text to train on, to calibrate on and to score on, without a download.

Quantization needs batches to train on, a few windows to calibrate on, and text that neither has seen, to measure
perplexity. Every reader of this project already has such a corpus: the docstrings of the installed packages, those of
the standard library, and the language reference that `help()` shows (harness/corpus.py). These are some ten million
tokens of technical English and code, without a network or a licence question.

    source code --ast--> docstrings --sha256--> train 96 %, validation 2 %, test 2 % --tokenizer--> ids [T]

* A document goes to its split by a hash of its own text. Equal texts meet in one split (and are kept once), so no
  document of validation or test is in train, and a new version of a package moves only the documents it changed.
* Documents are ordered by that hash, so the same texts give the same ids on every file system.

Limits: docstrings resemble each other, so perplexity is lower here than on other text; and readers with other package
versions have a slightly different text. Compare two models on one machine, or use "wikitext2", which is the same for
everyone.

    splits = load_text("docstrings", tokenizer)     # or "wikitext2", or the path of a text file or folder
    splits.train                                    # LongTensor [T], documents joined by the end-of-text id
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import LongTensor

from ..errors import UsageError
from ..language_model import check_tokens
from .corpus import docstrings
from .text_cache import cached

SPLITS = ("train", "validation", "test")
PIECE_CHARS = 1000  # a local file is cut at blank lines into pieces of at least this length
MIN_SPLIT_TOKENS = 256  # one window of the usual length


@dataclass(frozen=True)
class Splits:
    """Three disjoint texts as token ids: 1-D LongTensors, documents joined by the end-of-text id."""

    train: LongTensor
    validation: LongTensor
    test: LongTensor
    source: str

    @property
    def digest(self) -> str:
        """Which text this is, as 16 hex digits: results of another one differ. Needs numpy."""
        found = hashlib.sha256()
        for name in SPLITS:
            ids = getattr(self, name)
            found.update(len(ids).to_bytes(8, "little"))
            found.update(ids.int().numpy().astype("<i4").tobytes())
        return found.hexdigest()[:16]


def load_text(source: str, tokenizer, *, model=None, cache_dir: Path | None = None) -> Splits:
    """Token ids of a corpus, split into train, validation and test.

    Args:
        source: "docstrings" (offline), "wikitext2" (needs a download once), or the path of a text file or of a folder
            of .txt and .md files. Those are cut at blank lines into pieces of about 1000 characters, which are
            assigned to splits by hash, like documents. A window then holds several pieces, and pieces of the test
            split have neighbours in train: such perplexities compare models, but are not those of the text in order.
        tokenizer: a Hugging Face tokenizer with an `eos_token_id`, which joins the documents.
        model: a language model whose vocabulary must hold the ids.
        cache_dir: where ids of the named sources are kept (harness/text_cache.py). Local files are read each time.

    Raises:
        UsageError: unknown source, too little text, a tokenizer without end-of-text token, or ids that the model does
            not have.
        FileNotFoundError: "wikitext2" can be neither found nor downloaded.
    """
    source = str(source)
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end-of-text token to join documents; set tokenizer.eos_token")
    if source in ("docstrings", "wikitext2"):
        ids = cached(source, tokenizer, lambda: _tokenize(source, tokenizer), cache_dir)
    else:
        ids = _tokenize(source, tokenizer)
    if model is not None:
        for name in SPLITS:
            check_tokens(ids[name], model, f"the {name} text")
    return Splits(**ids, source=source)


def say_if_repeated(splits: Splits, tokens: int) -> None:
    """Print a note if training on so many tokens uses some of the text more than once."""
    if tokens > len(splits.train):
        print(f"note: the text has {len(splits.train)} training tokens, so {tokens} use some of it more than once")


def documents(source: str) -> dict[str, list[str]]:
    """The texts behind `load_text`, by split; train a tokenizer on documents(source)["train"] alone."""
    if source == "docstrings":
        return split_by_hash(docstrings())
    if source == "wikitext2":
        return _wikitext2()
    path = Path(os.path.expanduser(source))
    if not path.exists():
        raise UsageError(
            f"unknown text source {source!r}: accepted are 'docstrings', 'wikitext2', or the path of an "
            "existing text file or folder of .txt and .md files"
        )
    return split_by_hash(_local_pieces(path))


def split_by_hash(texts: list[str]) -> dict[str, list[str]]:
    """Assign texts to the splits (96/2/2 %) by their sha256, each text once, ordered by the hash."""
    by_hash = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts}
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for digest in sorted(by_hash):
        # The end of the digest decides, since its beginning is the sorting key.
        name = {0: "validation", 1: "test"}.get(int(digest[-8:], 16) % 50, "train")
        splits[name].append(by_hash[digest])
    return splits


# ----------------------------------------------------------------------------------------------- sources


def _local_pieces(path: Path) -> list[str]:
    """A file or folder, cut at blank lines into pieces of PIECE_CHARS or more, except the last of a file."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md") and file.is_file())
        if not files:
            raise UsageError(f"the folder {path} holds no .txt or .md file: give the folder of such files, or one file")
    pieces = []
    for file in files:
        piece = ""
        for paragraph in re.split(r"\n\s*\n", _utf8(file)):
            piece = f"{piece}\n\n{paragraph}" if piece else paragraph
            if len(piece) >= PIECE_CHARS:
                pieces.append(piece)
                piece = ""
        pieces.append(piece)
    return [piece.strip() for piece in pieces if piece.strip()]


def _utf8(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not UTF-8 ({error}): convert it, for instance by iconv -f ITS_ENCODING -t utf8, or leave it out"
        ) from error


def _wikitext2() -> dict[str, list[str]]:
    try:
        import datasets

        data = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
    except Exception as error:  # no package, offline, timeout, proxy, ...: the remedy is the same
        raise FileNotFoundError(
            f"WikiText-2 cannot be read by the package `datasets` ({type(error).__name__}: {error}). Install that and "
            "go online once, or use source='docstrings', which needs neither, or the path of a local text file."
        ) from error
    return {name: ["\n\n".join(data[name]["text"])] for name in SPLITS}


# --------------------------------------------------------------------------------------------- token ids


def _tokenize(source: str, tokenizer) -> dict[str, LongTensor]:
    texts = documents(source)
    ids = {name: encode(texts[name], tokenizer, name) for name in SPLITS}
    if min(map(len, ids.values())) < MIN_SPLIT_TOKENS:
        got = ", ".join(f"{len(t)} for {name}" for name, t in ids.items())
        raise UsageError(
            f"too little text in {source!r}: got {got} tokens, and each needs at least {MIN_SPLIT_TOKENS}. "
            "Validation and test get 2 % each, so give 250 000 characters or more, with blank lines to cut at"
        )
    return ids


def encode(texts: list[str], tokenizer, name: str = "text") -> LongTensor:
    """Token ids [T] of documents joined by the tokenizer's end-of-text id."""
    from tqdm.auto import tqdm

    ids: list[int] = []
    for start in tqdm(range(0, len(texts), 1000), desc=f"tokenizing {name}", leave=False):
        chunk = tokenizer(texts[start : start + 1000], add_special_tokens=False, verbose=False)["input_ids"]
        for document in chunk:
            ids += [*document, tokenizer.eos_token_id]
    return torch.tensor(ids[:-1], dtype=torch.long)
