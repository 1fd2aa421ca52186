"""Compressed files as streams of bytes, with an error unless the file is complete.

A file may consist of several frames (gzip's members, the streams of bzip2 and xz). A file that is
truncated within a frame, damaged, or followed by other bytes raises OSError without a number. The
standard library and `zstandard` take some of these for the end of the file.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from functools import partial
from typing import IO, Any

_READ_BYTES = 16 << 10  # of the file; zstd makes at most 512 MB of it
_MOST_BYTES = 1 << 20  # that bzip2 and xz may make of it at once
_ZERO_PADDED = ("gz", "xz")  # zeros may follow a frame, as on a tape
_LARGEST_WINDOW_BYTES = 1 << 31  # of zstd --long=31


def open_compressed(raw: IO[bytes], compression: str) -> io.BufferedReader:
    """The content of an open file that is `gz`, `zst`, `bz2` or `xz`."""
    return io.BufferedReader(_Decompressed(raw, compression), _MOST_BYTES)


class _Decompressed(io.RawIOBase):
    """Decompresses frame after frame, each with its own decompressor."""

    def __init__(self, raw: IO[bytes], compression: str) -> None:
        self._raw, self._compression = raw, compression
        self._new_frame, self._limit, self._errors = _codec(compression)
        self._frame: Any = None
        self._output = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, at least in part; 0 at the end of the last frame."""
        while not self._output:
            data = self._next_input()
            if data is None:
                return 0
            try:
                self._output = memoryview(self._frame.decompress(data, *self._limit))
            except self._errors as error:
                raise OSError(f"damaged {self._compression} data: {error}") from error
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _next_input(self) -> bytes | None:
        """The next input to decompress, with a new frame after a complete one; None at the end."""
        if self._frame is None or self._frame.eof:
            start = self._next_start(b"" if self._frame is None else self._frame.unused_data)
            if not start:
                return None
            self._frame = self._new_frame()
            return start
        if not getattr(self._frame, "needs_input", True):
            return b""
        data = self._raw.read(_READ_BYTES)
        if not data:
            raise OSError(f"Truncated {self._compression} data: the file is cut off")
        return data

    def _next_start(self, rest: bytes) -> bytes:
        """The beginning of the next frame; nothing at the end of the file."""
        is_padded = self._compression in _ZERO_PADDED and self._frame is not None
        while True:
            rest = rest.lstrip(b"\0") if is_padded else rest
            if rest:
                return rest
            rest = self._raw.read(_READ_BYTES)
            if not rest:
                return rest


def _codec(compression: str) -> tuple[Callable[[], Any], tuple[int, ...], Any]:
    """A function that makes a frame's decompressor, the limit of its output, and its errors."""
    if compression == "gz":
        return partial(zlib.decompressobj, wbits=16 + zlib.MAX_WBITS), (), zlib.error
    if compression == "bz2":
        return bz2.BZ2Decompressor, (_MOST_BYTES,), (OSError, ValueError)
    if compression == "xz":
        return lzma.LZMADecompressor, (_MOST_BYTES,), lzma.LZMAError
    import zstandard

    zstd = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW_BYTES)
    return zstd.decompressobj, (), zstandard.ZstdError
