"""The grid's text and its tokenizer: docstrings of packages that `make setup` installs.

A document is a source file of one of PACKAGES or of Python's standard library: its docstrings of at
least MIN_CHARACTERS, in order, without those that an earlier file has. Documents are shuffled by a
hash of their text, so that the front of the corpus is a sample of it. The text depends on the
versions of Python and of the packages, so every row of the results names its hash.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

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
MIN_CHARACTERS = 200
EOS_TOKEN = "<|endoftext|>"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def write_corpus(out: Path, packages: Sequence[str]) -> str:
    """Write the documents as JSON lines unless they are there; returns the SHA-256 of the file."""
    if not out.exists():
        texts = sorted(documents(packages), key=lambda text: hashlib.sha256(text.encode()).digest())
        temporary = out.with_suffix(".part")
        with temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        temporary.replace(out)
    return hashlib.sha256(out.read_bytes()).hexdigest()


def documents(packages: Sequence[str]) -> Iterator[str]:
    """The docstrings of each source file that has any."""
    seen: set[str] = set()
    for path in source_files(packages):
        found = [text for text in docstrings(path) if text not in seen]
        seen.update(found)
        if found:
            yield "\n\n\n".join(found)


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
