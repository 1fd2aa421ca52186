"""Files -> documents, streamed in an order that depends on nothing but the corpus itself.

A format is told by the file's name. Text: `.jsonl` (also `.jsonl.gz`, `.jsonl.zst`), `.parquet` and
`.arrow` hold one document per row under a text key, `.txt` and `.md` one document per file. Tokens:
see `token_corpus`. A folder stands for all such files below it, sorted by path. Whatever cannot be
read raises InputError with the file and the line or row: a document that is silently skipped would
shift everything after it.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shards.errors import InputError, RunError
from teacher_dump.json_lines import JSONL, open_lines, read_texts
from teacher_dump.rules import TokenisingRules
from teacher_dump.tables import num_rows, read_columns
from teacher_dump.token_corpus import TokenDocument, read_flat, read_lists, read_npy

TABLES = (".parquet", ".arrow")
PLAIN = (".txt", ".md")
TOKENS = (".npy", ".bin")
KNOWN = JSONL + TABLES + PLAIN + TOKENS

# What `datasets` writes: into a folder of several splits, each in a folder of its own; beside the
# files of a split that was saved, which it names; and beside those of a split or of a cache.
_SEVERAL_SPLITS, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"

# Errors that another file would not have; None: its content is damaged. With others a disk failed.
_WRONG_FILE = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR)

Document = str | TokenDocument


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """One file of the corpus; `name` is relative to what was given on the command line.

    Documents are taken `weight` times: 2 is twice, 0.5 every second one or so, by their content.
    """

    path: Path
    name: str
    weight: float = 1.0

    @property
    def paths(self) -> list[Path]:
        """The file itself and, of Megatron-LM's format, its index."""
        index = self.path.with_suffix(".idx")
        has_index = self.path.suffix == ".bin" and index.exists()
        return [self.path, index] if has_index else [self.path]


def list_files(corpus: Sequence[Path], weights: Sequence[float] = ()) -> list[CorpusFile]:
    """Every file of the corpus in reading order; InputError where there is none.

    `weights` are as many as there are corpora, or none: all 1.
    """
    files: list[CorpusFile] = []
    for given, weight in zip(corpus, weights or [1.0] * len(corpus), strict=True):
        if given.is_dir():
            files += [
                CorpusFile(path=path, name=str(path.relative_to(given)), weight=weight)
                for path in _files_below(given)
            ]
        elif not given.exists():
            raise InputError(f"{given}: no such corpus file or folder")
        elif not _is_known(given):
            raise InputError(f"{given}: not a kind of corpus file, expected {', '.join(KNOWN)}")
        else:
            files.append(CorpusFile(path=given, name=given.name, weight=weight))
    return files


def _files_below(folder: Path) -> list[Path]:
    """Corpus files, sorted by path; of a dataset that `datasets` saved, those that make it up."""
    for several in sorted(folder.rglob(_SEVERAL_SPLITS)):
        names = sorted(path.parent.name for path in several.parent.glob(f"*/{_STATE}"))
        raise InputError(f"{several.parent}: several splits ({', '.join(names)}), give one of them")
    found = sorted(path for path in folder.rglob("*") if _is_known(path) and path.is_file())
    tables = {path.parent for path in found if path.suffix == ".arrow"}
    saved = {parent: _saved_files(parent) for parent in sorted(tables)}
    files = [path for path in found if path.suffix != ".arrow" or path in saved[path.parent]]
    if not files:
        raise InputError(f"{folder}: no corpus file in it, expected {', '.join(KNOWN)}")
    return files


def _saved_files(folder: Path) -> set[Path]:
    """The `.arrow` files of a folder, without what `datasets` computed from them later."""
    state = folder / _STATE
    if state.exists():
        try:
            names = {entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]}
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{state}: not what `datasets` writes ({error!r})") from error
        for name in sorted(names):
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: not there, but {_STATE} names it")
        return {folder / name for name in names}
    if (folder / _INFO).exists():
        raise InputError(
            f"{folder}: a cache of `datasets`, with all splits and whatever was computed from them:"
            " save a split with save_to_disk, or give its .arrow files"
        )
    return set(folder.glob("*.arrow"))


def _is_known(path: Path) -> bool:
    return path.name.endswith(KNOWN)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_documents(file: CorpusFile, rules: TokenisingRules) -> Iterator[Document]:
    """The documents of one file, in order; InputError names the file and the line or row.

    RunError where the disk fails and not what is on it.
    """
    with _reading(file.path):
        if file.name.endswith(TABLES):
            yield from _read_table(file.path, rules)
        elif file.name.endswith(PLAIN):
            yield file.path.read_text(encoding="utf-8")
        elif file.name.endswith(".npy"):
            yield from read_npy(file.path, rules.eos_token_id)
        elif file.name.endswith(".bin"):
            yield from read_flat(file.path, rules.flat_dtype, rules.eos_token_id)
        else:
            with open_lines(file.path) as lines:
                yield from read_texts(file.path, rules.text_key, lines)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors that name the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason})") from error
    except (OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno not in _WRONG_FILE:
            raise RunError(f"{path}: {error.strerror}; the same command continues") from error
        raise InputError(f"{path}: cannot be read ({error})") from error


def size_of(document: Document) -> int:
    """Characters, or what the tokens would have as text, roughly."""
    return len(document) if isinstance(document, str) else 4 * len(document.tokens)


def read_sample(
    file: CorpusFile, rules: TokenisingRules, characters: int
) -> tuple[list[Document], float]:
    """Documents from the front of a file, at least so many characters, and their share of it.

    The share is 1 where the whole file was read.
    """
    documents: list[Document] = []

    def is_enough(document: Document) -> bool:
        nonlocal characters
        documents.append(document)
        characters -= size_of(document)
        return characters <= 0

    size = file.path.stat().st_size
    if file.name.endswith(JSONL):
        with _reading(file.path), open_lines(file.path) as lines:
            if any(map(is_enough, read_texts(file.path, rules.text_key, lines))):
                return documents, lines.share()
    elif file.name.endswith(PLAIN):
        documents += read_documents(file, rules)
    elif any(map(is_enough, read_documents(file, rules))):
        if file.name.endswith(TABLES):
            return documents, len(documents) / num_rows(file.path)
        tokens = sum(d.tokens.nbytes for d in documents if isinstance(d, TokenDocument))
        return documents, min(1.0, tokens / size)
    return documents, 1.0


def _read_table(path: Path, rules: TokenisingRules) -> Iterator[Document]:
    import pyarrow as pa

    if rules.token_key is not None:
        yield from read_lists(path, rules.token_key, rules.mask_key)
        return
    row = 0
    for columns in read_columns(path, (rules.text_key,)):
        column = columns[rules.text_key]
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise InputError(
                f"{path}: column {rules.text_key!r} is {column.type}, expected string"
                " (--token-key names a column of tokens)"
            )
        for text in column.to_pylist():
            if text is None:
                raise InputError(f"{path}: row {row}: {rules.text_key!r} is null")
            yield text
            row += 1
