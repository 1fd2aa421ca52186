"""JSON lines, compressed or not: one document per line, under a key.

Arrow decompresses: unlike the streams of `gzip` and `zstandard` it reports both a file that was cut
within a frame and one that goes on after it, as an OSError without a number.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from shards.errors import InputError

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_AHEAD_BYTES, _STEP_BYTES = 8 << 20, 64 << 10


class Lines:
    """The lines of an open file, and how much of the file they are."""

    def __init__(self, path: Path, raw: IO[bytes]) -> None:
        import pyarrow as pa

        self._path, self._raw, self._stream = path, raw, raw
        self._taken = 0
        compression = _COMPRESSIONS.get(path.suffix)
        if compression is not None and path.stat().st_size:
            decompressed = pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression)
            self._stream = cast("IO[bytes]", io.BufferedReader(decompressed))

    def __iter__(self) -> Iterator[bytes]:
        for line in self._stream:
            self._taken += len(line)
            yield line

    def share(self) -> float:
        """Part of the file, in (0, 1], that the lines taken are; 1 if there are no more.

        Takes lines away: how much a file is compressed shows when some of it has been read, beside
        which a block that was read and not yet decompressed is little.
        """
        found = self._taken
        while found < self._taken + _AHEAD_BYTES and (ahead := self._stream.read(_STEP_BYTES)):
            found += len(ahead)
        return min(1.0, self._taken / found * self._raw.tell() / self._path.stat().st_size)


@contextmanager
def open_lines(path: Path) -> Iterator[Lines]:
    """The lines of a file. OSError where it cannot be read or is damaged."""
    with path.open("rb") as raw:
        yield Lines(path, raw)


def read_texts(path: Path, text_key: str, lines: Lines) -> Iterator[str]:
    """The texts of a file's lines; InputError for a line that has none."""
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
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            half = ascii(text[error.start])
            raise InputError(
                f"{path}:{number}: {text_key!r} is no Unicode text ({half})"
            ) from error
        yield text


def _no_text(record: object, text_key: str) -> str:
    if not isinstance(record, dict):
        return f"expected an object with the key {text_key!r}, found {type(record).__name__}"
    if text_key in record:
        return f"{text_key!r} is {type(record[text_key]).__name__}, expected text"
    keys = ", ".join(map(repr, list(record)[:8])) or "none"
    return f"no key {text_key!r}, found {keys} (--text-key names the key)"
