"""JSON lines, compressed or not: one document per line, under a key."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shards.errors import InputError
from teacher_dump.corpus.compressed import open_compressed
from teacher_dump.corpus.kinds import compression_of
from teacher_dump.corpus.plain_text import BYTE_ORDER_MARK, refuse_wide_text

_AHEAD_BYTES, _STEP_BYTES = 8 << 20, 64 << 10


class Lines:
    """The lines of an open file, and how much of the file they are.

    A byte order mark at the beginning does not belong to the first line.
    """

    def __init__(self, path: Path, raw: IO[bytes]) -> None:
        self._path, self._raw = path, raw
        compression = compression_of(path.name)
        self._stream = (
            io.BufferedReader(io.FileIO(raw.fileno(), closefd=False), _STEP_BYTES)
            if compression is None
            else open_compressed(raw, compression)
        )
        start = self._stream.peek(len(BYTE_ORDER_MARK))
        refuse_wide_text(path, start)
        self._taken = 0
        if start.startswith(BYTE_ORDER_MARK):
            self._taken = len(self._stream.read(len(BYTE_ORDER_MARK)))
        self.is_array = self._stream.peek(1).lstrip()[:1] == b"["

    def __iter__(self) -> Iterator[bytes]:
        for line in self._stream:
            self._taken += len(line)
            yield line

    def share(self) -> float:
        """Part of the file, in (0, 1], that the lines taken are; 1 if there are no more.

        This consumes lines: only reading further shows how well the file compresses. A block that
        was read but not yet decompressed is small beside that.
        """
        num_bytes = self._taken
        while num_bytes < self._taken + _AHEAD_BYTES and (ahead := self._stream.read(_STEP_BYTES)):
            num_bytes += len(ahead)
        return min(1.0, self._taken / num_bytes * self._raw.tell() / self._path.stat().st_size)


@contextmanager
def open_lines(path: Path) -> Iterator[Lines]:
    """The lines of a file. OSError where it cannot be read or is damaged."""
    with path.open("rb") as raw:
        yield Lines(path, raw)


def read_texts(path: Path, text_key: str, lines: Lines) -> Iterator[str]:
    """The texts of a file's lines; InputError for a line that has none."""
    if lines.is_array:
        raise InputError(
            f"{path}:1: expected an object on each line, found one JSON document, an array; `jq -c"
            " '.[]'` makes lines of it"
        )
    is_first = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _not_json(path, number, line, error, is_first=is_first) from error
        is_first = False
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError(f"{path}:{number}: {_no_text(record, text_key)}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            half = ascii(text[error.start])
            raise InputError(
                f"{path}:{number}: {text_key!r} is not Unicode text ({half})"
            ) from error
        yield text


def _not_json(
    path: Path, number: int, line: bytes, error: Exception, *, is_first: bool
) -> InputError:
    """The error for a line that is no JSON: perhaps the file is one document over many lines."""
    goes_on = isinstance(error, json.JSONDecodeError) and error.pos >= len(
        line.decode(errors="replace").rstrip()
    )
    if is_first and goes_on and line.endswith(b"\n"):
        return InputError(
            f"{path}:{number}: expected an object on each line, found one JSON document over"
            " several lines; `jq -c .` puts it on one line, and a pattern such as --corpus"
            " 'DIR/*.jsonl' skips files that are not corpus"
        )
    return InputError(f"{path}:{number}: not a line of JSON ({error})")


def _no_text(record: object, text_key: str) -> str:
    if not isinstance(record, dict):
        return f"expected an object with the key {text_key!r}, found {type(record).__name__}"
    if text_key in record:
        return f"{text_key!r} is {type(record[text_key]).__name__}, expected text"
    keys = ", ".join(map(repr, list(record)[:8])) or "none"
    return f"no key {text_key!r}, found {keys} (--text-key names the key)"
