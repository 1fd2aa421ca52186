"""Ragged entries become rectangles [P, K], the shape in which a loss can use them.

Letters: P positions, E their entries, K the width of the rectangle.

A mask of where entries are is made once for a block of positions and serves both arrays: 20 ms for
7.3M entries in 123k positions of 100, whose decoding from Parquet takes 77 on one core. Copying
windows of K values and clipping them takes 14 while its large temporary arrays are recycled, and
several times as long when each of them is mapped afresh.

For the same reason the rectangles come from Arrow's memory pool, which keeps what is freed. Batches
that numpy allocates are given back to the kernel again and again; the page faults cost as much as
the padding (25 ms becomes 55 in batches of 4,096 positions).
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa

from shards.row_group import Int64Array
from shards.rows import Float32Array, Int32Array

# A block's mask stays in the cache, and the overhead of a call does not count.
_BLOCK_VALUES = 1 << 19


def empty_entries(shape: tuple[int, ...]) -> tuple[Int32Array, Float32Array]:
    """Uninitialised ids (int32) and logprobs (float32) of this shape, in recycled memory."""
    num_bytes = 4 * math.prod(shape)
    ids = np.frombuffer(pa.allocate_buffer(num_bytes), np.int32)
    logprobs = np.frombuffer(pa.allocate_buffer(num_bytes), np.float32)
    return ids.reshape(shape), logprobs.reshape(shape)


def pad_entries(
    entry_offsets: Int64Array,
    ids: Int32Array,
    logprobs: Float32Array,
    out: tuple[Int32Array, Float32Array] | None = None,
) -> tuple[Int32Array, Float32Array]:
    """Entries of P positions as ids [P, K] int32, 0 padded, logprobs [P, K] float32, -inf padded.

    `entry_offsets` [P + 1] are those of a row group, or of some consecutive positions of it, and
    count from the start of `ids` and `logprobs`. Without `out`, K is the largest number of entries
    at a position; with it, the results are written there. ValueError if K is too small.
    """
    counts = np.diff(entry_offsets)
    most = int(counts.max(initial=0))
    if out is None:
        out = empty_entries((len(counts), most))
    padded_ids, padded_logprobs = out
    width = padded_ids.shape[1]
    if most > width:
        raise ValueError(f"a position with {most} entries does not fit a width of {width}")

    # The narrowest type that holds every count is compared fastest.
    column_numbers = np.arange(width).astype(np.min_scalar_type(width))
    counts = counts.astype(column_numbers.dtype)
    block = max(1, _BLOCK_VALUES // max(1, width))
    for first in range(0, len(counts), block):
        rows = slice(first, first + block)
        there = column_numbers < counts[rows, None]
        entries = slice(entry_offsets[first], entry_offsets[: first + block + 1][-1])
        for padded, values, padding in (
            (padded_ids[rows], ids, 0),
            (padded_logprobs[rows], logprobs, -np.inf),
        ):
            padded.fill(padding)
            padded[there] = values[entries]
    return out
