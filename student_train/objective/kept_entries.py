"""Kept entries of a batch: ragged as in the shards, padded to rectangles for the loss alone.

Letters: N positions of a batch, E entries of all of them, K the most at any, R rows of a block.

At 12 entries per position most of a rectangle is padding. Only a loss needs it, on its own device
and for the rows it works on; until then a batch is smaller, and so is what a GPU copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from shards.rows import Float32Array, Int32Array

_Scalar = TypeVar("_Scalar", bound=np.generic)

# Rows times K that `padded_blocks` makes at once, 12 bytes each. With 2^14, 2^16 and 2^18 of them
# a position takes 0.07, 0.043 and 0.031 us at K = 22, 0.24, 0.12 and 0.076 us at K = 100 where
# nothing else runs (2 cores of an AMD EPYC).
_PLACES_AT_ONCE = 1 << 18


class Run(NamedTuple):
    """All entries of consecutive positions, from position `start` of a batch on.

    counts [P] are how many each position has, ids and logprobs [sum of counts] whose they are.
    """

    start: int
    counts: npt.NDArray[np.signedinteger]
    ids: Int32Array
    logprobs: Float32Array


class KeptEntries(NamedTuple):
    """Position n has `[offsets[n] : offsets[n + 1]]` of ids and logprobs; offsets [N + 1] int64.

    ids int32 and logprobs float32, nats, are both [E + K]: K times 0 and -inf follow the last
    entry, so that K can be read from where any position begins. `max_entries` is K.
    """

    offsets: Tensor
    ids: Tensor
    logprobs: Tensor
    max_entries: int

    @classmethod
    def gather(cls, runs: Iterable[Run], num_positions: int) -> Self:
        """Entries of N positions; those of no run have none. Runs ascend and do not overlap.

        ValueError if they do not fit into N positions, or their arrays to each other.
        """
        runs = list(runs)
        counts = np.zeros(num_positions, np.int64)
        for run in runs:
            counts[run.start : run.start + len(run.counts)] = run.counts
        offsets = np.zeros(num_positions + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        for run in runs:
            expected = int(offsets[run.start + len(run.counts)] - offsets[run.start])
            if not expected == len(run.ids) == len(run.logprobs):
                raise ValueError(
                    f"counts of {expected} entries, but {len(run.ids)} ids and"
                    f" {len(run.logprobs)} logprobs"
                )
        max_entries = int(counts.max(initial=0))
        num_entries = int(offsets[-1])
        ids = _recycled(num_entries + max_entries, np.int32)
        logprobs = _recycled(num_entries + max_entries, np.float32)
        ids[num_entries:], logprobs[num_entries:] = 0, -math.inf
        if runs:
            np.concatenate([run.ids for run in runs], out=ids[:num_entries])
            np.concatenate([run.logprobs for run in runs], out=logprobs[:num_entries])
        return cls(
            torch.from_numpy(offsets),
            torch.from_numpy(ids),
            torch.from_numpy(logprobs),
            max_entries,
        )

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Those of positions [R] int64: ids [R, K] int32, and logprobs [R, K] padded with -inf.

        The id of padding is that of any entry, or 0: one of the vocabulary, to be ignored.
        """
        return next(self.padded_blocks([rows]))

    def padded_blocks(self, blocks: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """As `padded`, for each block of rows, all in the same memory: the next ends the last.

        Several small blocks are padded together: most of the time goes to calling operations.
        """
        if not blocks:
            return
        k, rows = self.max_entries, torch.cat(list(blocks))
        starts = self.offsets.index_select(0, rows)
        missing = (starts - self.offsets[1:].index_select(0, rows)).add_(k)
        # Every position reads K values, its own entries and those that follow: whole rows, which
        # takes a third of the time of looking up each. -0.0 leaves what it is added to, even a 0.
        edge = self.logprobs.new_full((2 * k,), -0.0)  # from m on, K of it leave m entries out
        edge[k:] = -math.inf
        windows = [values.unfold(0, k, 1) for values in (self.ids, self.logprobs, edge)]
        groups = _grouped([len(block) for block in blocks], k)
        lengths = [sum(sizes) for sizes in groups]
        spaces = [_space_for(values, max(lengths)) for values in windows]
        for sizes, start, gap in zip(
            groups, torch.split(starts, lengths), torch.split(missing, lengths), strict=True
        ):
            ids, logprobs, mask = (
                torch.index_select(values, 0, first, out=space[: len(first)])
                for values, first, space in zip(windows, (start, start, gap), spaces, strict=True)
            )
            logprobs.add_(mask)
            yield from zip(torch.split(ids, sizes), torch.split(logprobs, sizes), strict=True)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same entries, every tensor changed: moved, say."""
        return self._replace(
            offsets=change(self.offsets), ids=change(self.ids), logprobs=change(self.logprobs)
        )


def _grouped(sizes: list[int], k: int) -> list[list[int]]:
    """Numbers of rows of blocks, those together that are padded at once, K of them a row."""
    together = max(1, _PLACES_AT_ONCE // max(1, max(sizes) * k))
    return [sizes[i : i + together] for i in range(0, len(sizes), together)]


def _space_for(windows: Tensor, rows: int) -> Tensor:
    """Uninitialised [rows, K] for as many of the windows [N, K]."""
    shape = (rows, windows.shape[1])
    if windows.device.type != "cpu":
        return windows.new_empty(shape)
    return torch.from_numpy(_recycled(math.prod(shape), windows.numpy().dtype.type)).view(shape)


def _recycled(size: int, scalar: type[_Scalar]) -> npt.NDArray[_Scalar]:
    """Uninitialised [size] from Arrow's pool, which keeps what is freed.

    What numpy allocates is given back to the kernel batch after batch; the page faults cost more
    than the copy.
    """
    buffer = pa.allocate_buffer(size * np.dtype(scalar).itemsize)
    return np.frombuffer(buffer, scalar)
