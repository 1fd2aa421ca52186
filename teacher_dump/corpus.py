"""Files -> documents, streamed in an order that depends on nothing but the corpus itself.

A format is told by the file's name. Text: `.jsonl` (also `.jsonl.gz`, `.jsonl.zst`), `.parquet` and
`.arrow` hold one document per row under a text key, `.txt` and `.md` one document per file. Tokens:
see `token_corpus`. A folder stands for all such files below it, sorted by path. Whatever cannot be
read raises InputError with the file and the line or row: a document that is silently skipped would
shift everything after it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from shards.errors import InputError
from teacher_dump.rules import TokenisingRules
from teacher_dump.tables import num_rows, read_columns
from teacher_dump.token_corpus import TokenDocument, read_flat, read_lists, read_npy

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TABLES = (".parquet", ".arrow")
PLAIN = (".txt", ".md")
TOKENS = (".npy", ".bin")
KNOWN = JSONL + TABLES + PLAIN + TOKENS

# What `datasets` writes into a folder that holds several splits, each in a folder of its own.
_SEVERAL_SPLITS = "dataset_dict.json"

_RATIO_BYTES = 1 << 20

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
            if (given / _SEVERAL_SPLITS).exists():
                names = sorted(path.parent.name for path in given.glob("*/state.json"))
                raise InputError(f"{given}: several splits ({', '.join(names)}), give one of them")
            found = sorted(path for path in given.rglob("*") if _is_known(path) and path.is_file())
            if not found:
                raise InputError(f"{given}: no corpus file in it, expected {', '.join(KNOWN)}")
            files += [
                CorpusFile(path=path, name=str(path.relative_to(given)), weight=weight)
                for path in found
            ]
        elif not given.exists():
            raise InputError(f"{given}: no such corpus file or folder")
        elif not _is_known(given):
            raise InputError(f"{given}: not a kind of corpus file, expected {', '.join(KNOWN)}")
        else:
            files.append(CorpusFile(path=given, name=given.name, weight=weight))
    return files


def _is_known(path: Path) -> bool:
    return path.name.endswith(KNOWN)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_documents(file: CorpusFile, rules: TokenisingRules) -> Iterator[Document]:
    """The documents of one file, in order; InputError names the file and the line or row."""
    try:
        if file.name.endswith(TABLES):
            yield from _read_table(file.path, rules)
        elif file.name.endswith(PLAIN):
            yield file.path.read_text(encoding="utf-8")
        elif file.name.endswith(".npy"):
            yield from read_npy(file.path, rules.eos_token_id)
        elif file.name.endswith(".bin"):
            yield from read_flat(file.path, rules.flat_dtype, rules.eos_token_id)
        else:
            with file.path.open("rb") as raw, _open_lines(file.path, raw) as lines:
                yield from _read_jsonl(file.path, rules.text_key, lines)
    except UnicodeDecodeError as error:
        raise InputError(f"{file.path}: not UTF-8 text ({error.reason})") from error
    except (OSError, EOFError) as error:
        raise InputError(f"{file.path}: cannot be read ({error})") from error


def size_of(document: Document) -> int:
    """Characters, or what the tokens would have as text, roughly."""
    return len(document) if isinstance(document, str) else 4 * len(document.tokens)


def read_sample(
    file: CorpusFile, rules: TokenisingRules, characters: int
) -> tuple[list[Document], float]:
    """Documents from the front of a file, at least so many characters, and their share of it.

    The share is 1 where the whole file was read. Of compressed lines it is told from how far the
    reader is.
    """
    documents: list[Document] = []

    def is_enough(document: Document) -> bool:
        nonlocal characters
        documents.append(document)
        characters -= size_of(document)
        return characters <= 0

    size = file.path.stat().st_size
    if file.name.endswith(JSONL):
        with file.path.open("rb") as raw, _open_lines(file.path, raw) as lines:
            if any(map(is_enough, _read_jsonl(file.path, rules.text_key, lines))):
                is_zstd = file.name.endswith(".zst")
                done = lines.tell() / _zstd_ratio(file.path) if is_zstd else raw.tell()
                return documents, min(1.0, done / size)
    elif file.name.endswith(PLAIN):
        documents += read_documents(file, rules)
    elif any(map(is_enough, read_documents(file, rules))):
        if file.name.endswith(TABLES):
            return documents, len(documents) / num_rows(file.path)
        tokens = sum(d.tokens.nbytes for d in documents if isinstance(d, TokenDocument))
        return documents, min(1.0, tokens / size)
    return documents, 1.0


def _zstd_ratio(path: Path) -> float:
    """Bytes per compressed byte at the front of a file: zstd reads ahead by whole blocks."""
    import zstandard

    with path.open("rb") as raw:
        compressed = raw.read(_RATIO_BYTES)
    decompressed = zstandard.ZstdDecompressor().decompressobj().decompress(compressed)
    return max(1, len(decompressed)) / max(1, len(compressed))


def _open_lines(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.name.endswith(".gz"):
        return cast("IO[bytes]", gzip.GzipFile(fileobj=raw, mode="rb"))
    if path.name.endswith(".zst"):
        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(reader)
    return raw


def _read_jsonl(path: Path, text_key: str, lines: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not a line of JSON ({error})") from error
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError(f"{path}:{number}: {_no_text(record, text_key)}")
        yield text


def _no_text(record: object, text_key: str) -> str:
    if not isinstance(record, dict):
        return f"expected an object with the key {text_key!r}, found {type(record).__name__}"
    if text_key in record:
        return f"{text_key!r} is {type(record[text_key]).__name__}, expected text"
    keys = ", ".join(map(repr, list(record)[:8])) or "none"
    return f"no key {text_key!r}, found {keys} (--text-key names the key)"


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
