"""Ragged entries become rectangles [N, K], the shape in which a loss can use them.

Letters: N positions, P consecutive ones of them, E entries, K the width of the rectangles.

A position's entries and what follows them are a window of K values. Windows are copied whole, as
items of 4 K bytes, and a line of a small table, one for every number of entries, turns the
log-probabilities that are not the position's own into -inf. The ids are left: an entry of
probability 0 may have any. That takes less than two thirds of the time of writing both through a
boolean mask.

The rectangles come from Arrow's memory pool, which keeps what is freed. Batches that numpy
allocates are given back to the kernel again and again, and the page faults cost as much as the
padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.row_group import Int64Array, Offsets
from shards.rows import Float32Array, Int32Array

_Scalar = TypeVar("_Scalar", bound=np.generic)

# Fewer values make the calls show, more leave the cache.
_BLOCK_VALUES = 1 << 16


class Run(NamedTuple):
    """Entries of P consecutive positions, for the lines `[line : line + P]` of the rectangles.

    Position p has `[offsets[p] : offsets[p + 1]]` of ids (int32) and logprobs (float32), which may
    hold those of other positions too. offsets [P + 1] ascend.
    """

    line: int
    offsets: Offsets
    ids: Int32Array
    logprobs: Float32Array


def pad_entries(runs: Sequence[Run], num_lines: int) -> tuple[Int32Array, Float32Array]:
    """ids [N, K] int32 padded with any of `ids` or 0, logprobs [N, K] float32 padded with -inf.

    N is `num_lines`, K the largest number of entries at any position. Lines of no run, which must
    not overlap and come in order, are padding.
    """
    counts = np.zeros(num_lines, np.int64)
    for line, offsets, _, _ in runs:
        np.subtract(offsets[1:], offsets[:-1], out=counts[line : line + len(offsets) - 1])
    width = int(counts.max(initial=0))
    padded_ids = _recycled((num_lines, width), np.int32)
    padded_logprobs = _recycled((num_lines, width), np.float32)
    if not width:
        return padded_ids, padded_logprobs
    window = np.dtype((np.void, width * padded_ids.itemsize))
    id_lines = padded_ids.view(window)[:, 0]
    upper_limits = _upper_limits(width)
    block = max(1, _BLOCK_VALUES // width)
    limits = _recycled((min(block, num_lines), width), np.float32)
    filled = 0
    for line, offsets, ids, logprobs in runs:
        padded_ids[filled:line] = 0
        padded_logprobs[filled:line] = -np.inf
        filled = line + len(offsets) - 1
        run_starts = offsets[:-1].astype(np.int64, copy=False)
        for first in range(line, filled, block):
            lines = slice(first, min(first + block, filled))
            starts = run_starts[lines.start - line : lines.stop - line]
            id_lines[lines] = _windows(ids, starts, window)
            found = _windows(logprobs, starts, window).view(np.float32)
            limit = limits[: len(starts)]
            # With another mode, take would copy through a buffer.
            upper_limits.take(counts[lines], 0, out=limit, mode="clip")
            np.minimum(found.reshape(limit.shape), limit, out=padded_logprobs[lines])
    padded_ids[filled:] = 0
    padded_logprobs[filled:] = -np.inf
    return padded_ids, padded_logprobs


@lru_cache(maxsize=4)
def _upper_limits(width: int) -> Float32Array:
    """[width + 1, width]: a line for every number of entries, inf for these and -inf beyond."""
    own = np.arange(width) < np.arange(width + 1)[:, None]
    limits = np.where(own, np.float32(np.inf), np.float32(-np.inf))
    limits.flags.writeable = False
    return limits


def _recycled(shape: tuple[int, ...], scalar: type[_Scalar]) -> npt.NDArray[_Scalar]:
    """Uninitialised [shape] from the pool."""
    buffer = pa.allocate_buffer(math.prod(shape) * np.dtype(scalar).itemsize)
    return np.frombuffer(buffer, scalar).reshape(shape)


def _windows(
    values: Int32Array | Float32Array, starts: Int64Array, window: np.dtype[np.void]
) -> npt.NDArray[np.void]:
    """[R]: what a window shows from each of R starts on, which ascend."""
    width = window.itemsize // values.itemsize
    if starts[-1] + width > len(values):
        # The last windows would reach beyond what there is.
        values = np.concatenate([values[starts[0] :], np.zeros(width, values.dtype)])
        starts = starts - starts[0]
    windows = np.ndarray((len(values) - width + 1,), window, values, strides=(values.itemsize,))
    return windows[starts]
