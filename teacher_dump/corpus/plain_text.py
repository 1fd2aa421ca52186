"""Text files: one document each, UTF-8. A byte order mark at the beginning is not text."""

from __future__ import annotations

import codecs
from pathlib import Path

from shards.errors import InputError

BYTE_ORDER_MARK = codecs.BOM_UTF8

# UTF-32's little-endian mark begins like UTF-16's.
_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_LOOKED_AT_BYTES = 4096


def read_plain_text(path: Path) -> str:
    """The text of a file, every line ended by a line feed; InputError for UTF-16 or UTF-32."""
    with path.open("rb") as stream:
        refuse_wide_text(path, stream.read(_LOOKED_AT_BYTES))
    return path.read_text(encoding="utf-8-sig")


def refuse_wide_text(path: Path, start: bytes) -> None:
    """InputError for the start of a text of two or four bytes a character, marked as such or not.

    Without a mark, text that is mostly Latin shows by the zero bytes at every second place.
    """
    encoding = next((name for mark, name in _WIDE_MARKS.items() if start.startswith(mark)), None)
    for half in (start[:_LOOKED_AT_BYTES:2], start[1:_LOOKED_AT_BYTES:2]):
        if encoding is None and len(half) > 1 and half.count(0) > len(half) // 2:
            encoding = "UTF-16"
    if encoding is not None:
        raise InputError(
            f"{path}: {encoding} text, expected UTF-8; `iconv -f {encoding} -t UTF-8` converts it"
        )
