"""The grid's text and its tokenizer: docstrings of packages that `make setup` installs.

A file is a source file of one of the packages or of Python's standard library: its docstrings of at
least MIN_CHARACTERS, in order, without those that an earlier file has. A hash of a file's text
decides whether it is held out. Documents are pieces of files, shuffled by another hash of their
text: so any few sequences of the corpus come from many files, and the front of it is a sample of
all. The text depends on the versions of Python and of the packages, so every row of the results
names it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

STANDARD_LIBRARY = "stdlib"
PACKAGES = (
    STANDARD_LIBRARY,
    "networkx",
    "nltk",
    "numpy",
    "pandas",
    "sympy",
    "torch",
    "transformers",
)
NOT_EVERYWHERE = {"site-packages", "dist-packages", "test", "idlelib"}
MIN_CHARACTERS, MAX_CHARACTERS = 200, 4000
BETWEEN = "\n\n\n"
EOS_TOKEN = "<|endoftext|>"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Corpus(NamedTuple):
    """Two files of JSON lines, and a hash of both."""

    train: Path
    held_out: Path
    sha256: str


def write_corpus(folder: Path, packages: Sequence[str], held_out: float) -> Corpus:
    """Write the documents of a fraction of the files and those of the others, unless there."""
    files = Path(folder / "train.jsonl"), Path(folder / "held-out.jsonl")
    if not folder.exists():
        texts = list(file_texts(packages))
        unfinished = folder.with_name(folder.name + ".part")
        unfinished.mkdir(parents=True, exist_ok=True)
        for file, wanted in zip(files, (False, True), strict=True):
            chosen = [text for text in texts if (_chance("held out", text) < held_out) == wanted]
            documents = [piece for text in chosen for piece in pieces(text)]
            documents.sort(key=partial(_chance, "order"))
            with (unfinished / file.name).open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps({"text": text}) + "\n" for text in documents)
        unfinished.rename(folder)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return Corpus(*files, digest)


def file_texts(packages: Sequence[str]) -> Iterator[str]:
    """The docstrings of each source file that has any."""
    seen: set[str] = set()
    for path in source_files(packages):
        found = [text for text in docstrings(path) if text not in seen]
        seen.update(found)
        if found:
            yield BETWEEN.join(found)


def pieces(text: str) -> Iterator[str]:
    """A file's docstrings in pieces of about MAX_CHARACTERS, a longer docstring in one."""
    piece = ""
    for part in text.split(BETWEEN):
        if piece and len(piece) + len(part) > MAX_CHARACTERS:
            yield piece
            piece = ""
        piece = f"{piece}{BETWEEN}{part}" if piece else part
    yield piece


def _chance(purpose: str, text: str) -> float:
    """A number in [0, 1) that belongs to a text; those of two purposes are independent."""
    digest = hashlib.sha256(f"{purpose}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def source_files(packages: Sequence[str]) -> Iterator[Path]:
    """The files of each package. SystemExit if one is missing."""
    for package in packages:
        if package == STANDARD_LIBRARY:
            folder = Path(sysconfig.get_paths()["stdlib"])
        else:
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                raise SystemExit(f"the package {package} is not installed: run make setup")
            folder = Path(spec.submodule_search_locations[0])
        for path in sorted(folder.rglob("*.py")):
            if package != STANDARD_LIBRARY or _is_everywhere(path.relative_to(folder)):
                yield path


def _is_everywhere(path: Path) -> bool:
    """Whether every installation of Python has this file of the standard library."""
    return not NOT_EVERYWHERE & set(path.parts)


def docstrings(path: Path) -> Iterator[str]:
    """The longer docstrings of a source file; none if Python cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about strings in old sources
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        if text and len(text) >= MIN_CHARACTERS:
            yield text


def write_tokenizer(folder: Path, corpus: Path, vocab_size: int) -> None:
    """Train a byte-level BPE on the corpus and write it as a Hugging Face folder, unless there."""
    if folder.exists():
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with corpus.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    unfinished = folder.with_name(folder.name + ".part")
    unfinished.mkdir(exist_ok=True)
    tokenizer.save(str(unfinished / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS_TOKEN}
    (unfinished / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    unfinished.rename(folder)
