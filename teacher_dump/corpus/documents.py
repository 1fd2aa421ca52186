"""Stream the documents of corpus files, in an order that depends on the corpus alone.

The name of a file decides its format (`kinds.py`). JSON lines, Parquet and Arrow hold one text per
line or row, `.txt` and `.md` files one text each, and `token_files.py` reads token ids. A file that
cannot be read raises InputError with the line or row: silently skipping a document would shift
everything after it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import InputError, RunError
from teacher_dump.corpus.json_lines import open_lines, read_texts
from teacher_dump.corpus.kinds import TABLES, Kind
from teacher_dump.corpus.listing import CorpusFile
from teacher_dump.corpus.plain_text import read_plain_text
from teacher_dump.corpus.rules import TokenisingRules
from teacher_dump.corpus.tables import num_rows, read_table_texts
from teacher_dump.corpus.token_files import TokenDocument, read_flat, read_lists, read_npy

# Errors of this file (None: damaged content). Any other error means that the disk failed.
_WRONG_FILE = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR)

Document = str | TokenDocument


def read_documents(file: CorpusFile, rules: TokenisingRules) -> Iterator[Document]:
    """The documents of one file, in order; InputError names the file and the line or row.

    RunError if the disk fails.
    """
    path, kind = file.path, file.kind
    with _reading(path):
        if kind in TABLES and rules.token_key is not None:
            yield from read_lists(path, rules.token_key, rules.mask_key)
        elif kind in TABLES:
            yield from read_table_texts(path, rules.text_key)
        elif kind is Kind.TEXT:
            yield read_plain_text(path)
        elif kind is Kind.NUMPY:
            yield from read_npy(path, rules.eos_token_id)
        elif kind is Kind.FLAT:
            yield from read_flat(path, rules)
        else:
            with open_lines(path) as lines:
                yield from read_texts(path, rules.text_key, lines)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors that name the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason})") from error
    except (OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno not in _WRONG_FILE:
            raise RunError(
                f"{path}: {error.strerror}; run the same command again to continue"
            ) from error
        raise InputError(f"{path}: cannot be read ({error})") from error


def size_of(document: Document) -> int:
    """Characters, or what the tokens would have as text, roughly."""
    return len(document) if isinstance(document, str) else 4 * len(document.tokens)


def read_sample(
    file: CorpusFile, rules: TokenisingRules, characters: int
) -> tuple[list[Document], float]:
    """Documents from the front of a file, at least this many characters, and their share of it.

    The share is 1 where the whole file was read.
    """
    documents: list[Document] = []

    def is_enough(document: Document) -> bool:
        nonlocal characters
        documents.append(document)
        characters -= size_of(document)
        return characters <= 0

    size = file.path.stat().st_size
    if file.kind is Kind.JSON_LINES:
        with _reading(file.path), open_lines(file.path) as lines:
            if any(map(is_enough, read_texts(file.path, rules.text_key, lines))):
                return documents, lines.share()
    elif file.kind is Kind.TEXT:
        documents += read_documents(file, rules)
    elif any(map(is_enough, read_documents(file, rules))):
        if file.kind in TABLES:
            return documents, len(documents) / num_rows(file.path)
        tokens = sum(d.tokens.nbytes for d in documents if isinstance(d, TokenDocument))
        return documents, min(1.0, tokens / size)
    return documents, 1.0
