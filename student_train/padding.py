"""Ragged entries become rectangles [N, K], the shape in which a loss can use them.

Letters: N positions, P consecutive ones of them, K the width of the rectangles.

At 12 entries per position most of a rectangle is padding, so this is bound by writing to memory:
a compiled loop takes 0.4 of what numpy needs, which writes everything two or three times.

The rectangles come from Arrow's memory pool, which keeps what is freed. Batches that numpy
allocates are given back to the kernel again and again, and the page faults cost as much as the
padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.row_group import Offsets
from shards.rows import Float32Array, Int32Array

_Scalar = TypeVar("_Scalar", bound=np.generic)


class Run(NamedTuple):
    """Entries of P consecutive positions, for the lines `[line : line + P]` of the rectangles.

    Position p has `[offsets[p] : offsets[p + 1]]` of ids (int32) and logprobs (float32), which may
    hold those of other positions too. offsets [P + 1] ascend. `most` is the largest number of
    entries at a position, for a caller that knows it and has checked the offsets.
    """

    line: int
    offsets: Offsets
    ids: Int32Array
    logprobs: Float32Array
    most: int | None = None


def pad_entries(runs: Sequence[Run], num_lines: int) -> tuple[Int32Array, Float32Array]:
    """ids [N, K] int32 padded with 0, logprobs [N, K] float32 padded with -inf.

    N is `num_lines`, K the largest number of entries at any position. Lines of no run, which must
    not overlap and come in order, are padding. ValueError for offsets that leave ids or logprobs.
    """
    width = max((_largest_count(run) for run in runs), default=0)
    ids = _recycled((num_lines, width), np.int32)
    logprobs = _recycled((num_lines, width), np.float32)
    filled = 0
    for run in runs:
        ids[filled : run.line] = 0
        logprobs[filled : run.line] = -np.inf
        filled = run.line + len(run.offsets) - 1
        if filled > num_lines:
            raise ValueError(f"a run ends at line {filled} of {num_lines}")
        lines = slice(run.line, filled)
        _write_lines(run.offsets, run.ids, run.logprobs, ids[lines], logprobs[lines])
    ids[filled:] = 0
    logprobs[filled:] = -np.inf
    return ids, logprobs


def _largest_count(run: Run) -> int:
    """At any position of a run, after checking that all its entries are there to be read."""
    if run.most is not None:
        return run.most
    num_entries = min(len(run.ids), len(run.logprobs))
    smallest, largest = _extreme_counts(run.offsets)
    if run.offsets[0] < 0 or run.offsets[-1] > num_entries or smallest < 0:
        raise ValueError(f"offsets do not ascend from 0 to at most {num_entries}")
    return largest


def _recycled(shape: tuple[int, ...], scalar: type[_Scalar]) -> npt.NDArray[_Scalar]:
    """Uninitialised [shape] from the pool."""
    buffer = pa.allocate_buffer(math.prod(shape) * np.dtype(scalar).itemsize)
    return np.frombuffer(buffer, scalar).reshape(shape)


def _count_loop(offsets: Offsets) -> tuple[int, int]:
    """The smallest number of entries at any position, or 0, and the largest, or 0."""
    smallest = largest = 0
    for line in range(len(offsets) - 1):
        count = offsets[line + 1] - offsets[line]
        smallest = min(smallest, count)
        largest = max(largest, count)
    return smallest, largest


def _line_loop(
    offsets: Offsets,
    ids: Int32Array,
    logprobs: Float32Array,
    padded_ids: Int32Array,
    padded_logprobs: Float32Array,
) -> None:
    """Entries of P positions -> padded_ids, padded_logprobs [P, K]. Nothing is checked.

    A line reads K values, its own entries and those that follow: that has no branch in it.
    """
    width = padded_ids.shape[1]
    for line in range(len(padded_ids)):
        start = offsets[line]
        # With 64 bits the comparison costs more than the copy.
        count = np.int32(offsets[line + 1] - start)
        readable = min(width, len(ids) - start, len(logprobs) - start)
        line_ids, line_logprobs = padded_ids[line], padded_logprobs[line]
        from_ids, from_logprobs = ids[start:], logprobs[start:]
        for k in range(readable):
            own = np.int32(k) < count
            line_ids[k] = from_ids[k] if own else np.int32(0)
            line_logprobs[k] = from_logprobs[k] if own else np.float32(-np.inf)
        for k in range(readable, width):
            line_ids[k] = 0
            line_logprobs[k] = -np.inf


# Compiled at the first call of a process, half a second: caches need a folder to write to.
_compiled = numba.njit(nogil=True)
_extreme_counts: Callable[[Offsets], tuple[int, int]] = _compiled(_count_loop)
_write_lines: Callable[[Offsets, Int32Array, Float32Array, Int32Array, Float32Array], None]
_write_lines = _compiled(_line_loop)
