"""Files -> documents, streamed in an order that depends on nothing but the corpus itself.

A format is told by the file's name: `.jsonl` (also `.jsonl.gz`, `.jsonl.zst`) and `.parquet` hold
one document per row under a text key, `.txt` and `.md` hold one document per file. A folder stands
for all such files below it, sorted by path. Whatever cannot be read raises InputError with the file
and the line or row: a document that is silently skipped would shift everything after it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shards.errors import InputError

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
PLAIN = (".txt", ".md")
KNOWN = JSONL + PARQUET + PLAIN


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """One file of the corpus; `name` is relative to what was given on the command line."""

    path: Path
    name: str


def list_files(corpus: Sequence[Path]) -> list[CorpusFile]:
    """Every file of the corpus in reading order; InputError where there is none."""
    files: list[CorpusFile] = []
    for given in corpus:
        if given.is_dir():
            found = sorted(path for path in given.rglob("*") if _is_known(path) and path.is_file())
            if not found:
                raise InputError(f"{given}: no corpus file in it, expected {', '.join(KNOWN)}")
            files += [CorpusFile(path=p, name=str(p.relative_to(given))) for p in found]
        elif not given.exists():
            raise InputError(f"{given}: no such corpus file or folder")
        elif not _is_known(given):
            raise InputError(f"{given}: not a kind of corpus file, expected {', '.join(KNOWN)}")
        else:
            files.append(CorpusFile(path=given, name=given.name))
    return files


def _is_known(path: Path) -> bool:
    return path.name.endswith(KNOWN)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_documents(file: CorpusFile, text_key: str) -> Iterator[str]:
    """The documents of one file, in order; InputError names the file and the line or row."""
    try:
        if file.name.endswith(PARQUET):
            yield from _read_parquet(file.path, text_key)
        elif file.name.endswith(PLAIN):
            yield file.path.read_text(encoding="utf-8")
        else:
            yield from _read_jsonl(file.path, text_key)
    except UnicodeDecodeError as error:
        raise InputError(f"{file.path}: not UTF-8 text ({error.reason})") from error
    except (OSError, EOFError) as error:
        raise InputError(f"{file.path}: cannot be read ({error})") from error


def _open_lines(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(
            path.open("rb"), read_across_frames=True, closefd=True
        )
        return io.BufferedReader(reader)
    return path.open("rb")


def _read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    with _open_lines(path) as lines:
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


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                found = ", ".join(map(repr, names[:8]))
                raise InputError(
                    f"{path}: no column {text_key!r}, found {found} (--text-key names the column)"
                )
            column = file.schema_arrow.field(text_key).type
            if not (pa.types.is_string(column) or pa.types.is_large_string(column)):
                raise InputError(f"{path}: column {text_key!r} is {column}, expected string")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise InputError(f"{path}: row {row}: {text_key!r} is null")
                    yield text
                    row += 1
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file that can be read ({error})") from error
