"""The values of `logprobs` without its lists, which are those of `ids`.

Most of the time in which Arrow decodes either column (docs/benchmarks.md has figures) goes to its
lists: of every value Parquet stores on which level a new one begins. Arrow decodes those of `ids`;
here the pages of the other column are decompressed, their levels compared with those of `ids` byte
for byte, and the values that follow put together from their bytes.

That takes pages as `writer_options` makes them: version 1, BYTE_STREAM_SPLIT, zstd, and ending at
the same value in both columns. None of it is part of the format. What differs is left to Arrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shards.rows import Float32Array

# https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
_DATA_PAGE: Final = 0  # a PageType
_RLE, _BYTE_STREAM_SPLIT = 3, 9  # Encodings

# Of the compact protocol of Thrift, doc/specs/thrift-compact-protocol.md of its repository.
_INTEGERS, _STRUCT = (4, 5, 6), 12

# What a header that is none of ours can do to those who read it.
_NOT_UNDERSTOOD = (IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)

# Values put together at a time. Those of a whole page leave the cache between passes, 6 to 10 % of
# `values_in_lists_of` on 2 cores of a Xeon with 1 MiB of it each.
_VALUES_AT_ONCE = 1 << 17


class _Page(NamedTuple):
    """A data page: its compressed bytes, how many they become, and at most how many values."""

    content: pa.Buffer
    num_bytes: int
    num_values: int


def values_in_lists_of(
    lists: pq.ColumnChunkMetaData, chunk: pq.ColumnChunkMetaData, file: pa.Buffer
) -> Float32Array | None:
    """The float32 values [E] of a column chunk, if its lists are those of the chunk `lists`.

    Both are lists of lists, and nothing is null. None if the lists differ, or if pages are of a
    kind that is not known here.
    """
    try:
        pages, list_pages = _data_pages(chunk, file), _data_pages(lists, file)
    except _NOT_UNDERSTOOD:
        return None
    if chunk.physical_type != "FLOAT" or len(pages) != len(list_pages):
        return None
    codec = pa.Codec("zstd")
    # An empty list counts as a value.
    at_most = sum(min(page.num_values, page.num_bytes // 4) for page in pages)
    values = np.frombuffer(pa.allocate_buffer(at_most * 4), np.uint32)
    num_values = 0
    for page, list_page in zip(pages, list_pages, strict=True):
        body = codec.decompress(page.content, page.num_bytes)
        levels_bytes = _levels_bytes(body)
        with pa.CompressedInputStream(pa.BufferReader(list_page.content), "zstd") as stream:
            same = body.slice(0, levels_bytes).equals(stream.read_buffer(levels_bytes))
        data = np.frombuffer(body, np.uint8)[levels_bytes:]
        size = len(data) // 4
        if not same or page.num_values != list_page.num_values or size > page.num_values:
            return None
        _join(data.reshape(4, size), values[num_values : num_values + size])
        num_values += size
    values.flags.writeable = False  # as those that Arrow decodes
    return values[:num_values].view(np.float32)


def _join(planes: npt.NDArray[np.uint8], words: npt.NDArray[np.uint32]) -> None:
    """Bytes [4, E], lowest first, to words [E]."""
    for start in range(0, len(words), _VALUES_AT_ONCE):
        part = slice(start, start + _VALUES_AT_ONCE)
        word = words[part]
        word[:] = planes[3, part]
        for plane in planes[2::-1, part]:
            word <<= 8
            word |= plane


def _levels_bytes(body: pa.Buffer) -> int:
    """How many bytes of a page are repetition and definition levels, each after its length."""
    length = 0
    for _ in range(2):
        length += 4 + int.from_bytes(body.slice(length, 4).to_pybytes(), "little")
    return length


def _data_pages(chunk: pq.ColumnChunkMetaData, file: pa.Buffer) -> list[_Page]:
    """One of `_NOT_UNDERSTOOD` for anything but pages of the kind that is known here."""
    if chunk.compression != "ZSTD" or chunk.has_dictionary_page:
        raise ValueError("another compression, or a dictionary")
    return list(_pages(file.slice(chunk.data_page_offset, chunk.total_compressed_size)))


def _pages(content: pa.Buffer) -> Iterator[_Page]:
    numbers, position = memoryview(content).cast("B"), 0
    while position < len(numbers):
        header, position = _struct(numbers, position)
        data = header[5]
        known = (_DATA_PAGE, _BYTE_STREAM_SPLIT, _RLE, _RLE)
        if (header[1], data[2], data[3], data[4]) != known:
            raise ValueError("another kind of page")
        yield _Page(content.slice(position, header[3]), header[2], data[1])
        position += header[3]


def _struct(content: memoryview, position: int) -> tuple[dict[int, Any], int]:
    """Fields of a Thrift struct by number, and where it ends; of numbers and structs."""
    fields: dict[int, Any] = {}
    field = 0
    while (head := content[position]) != 0:
        position += 1
        step, kind = divmod(head, 16)
        if step == 0:
            raise ValueError("a field number that is written out")
        field += step
        if kind in _INTEGERS:
            fields[field], position = _integer(content, position)
        elif kind == _STRUCT:
            fields[field], position = _struct(content, position)
        else:
            raise ValueError(f"Thrift type {kind}")
    return fields, position + 1


def _integer(content: memoryview, position: int) -> tuple[int, int]:
    """A zigzag number in groups of 7 bits, lowest first, and where it ends."""
    number = shift = 0
    while True:
        byte = content[position]
        position += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number >> 1 ^ -(number & 1), position
