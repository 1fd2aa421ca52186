"""Sequences from shards become padded batches.

Letters: B sequences, L positions of the longest of them, K kept entries at most.

Inputs are `tokens[:-1]` and labels `tokens[1:]`: the row holds the shift already, position t of
`ids` is the teacher's distribution over `labels[t]`, and nothing shifts again. Rows are padded at
their end, where causal attention keeps padding from everything that counts.

A row group's columns are views of what Arrow decoded; the only copy is into the batch. Memory is
the order's window of row groups, as many that are decoded ahead, and the batch itself, whatever the
size of the dataset. Columns that nobody asked for are not read from disk.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from shards.dataset import Split
from shards.padding import Run, pad_entries
from shards.row_group import RowGroup, require
from shards.schema import ENTRY_COLUMNS, LOSS_MASK, TAIL_LOGMASS, TOKENS
from student_train.decode_ahead import decode_ahead
from student_train.loss import IGNORE_INDEX
from student_train.order import GROUPS_PER_WINDOW, Order

TOKEN_COLUMNS = (TOKENS, LOSS_MASK)
TARGET_COLUMNS = (*TOKEN_COLUMNS, *ENTRY_COLUMNS)
TAIL_COLUMNS = (*TARGET_COLUMNS, TAIL_LOGMASS)

# While a window is padded, the next one is decoded.
_ROW_GROUPS_AHEAD = GROUPS_PER_WINDOW

_Place = tuple[RowGroup, int]  # a row group and a row of it


@dataclass(frozen=True, kw_only=True)
class Batch:
    """input_ids, labels [B, L] int64; ids [B, L, K] int32, logprobs [B, L, K] float32, nats.

    labels are -100 where padded or where `loss_mask` is false; num_valid counts the others.
    logprobs and tail_logmass [B, L] float32 are padded with -inf, ids with any of the shard; None
    if not read, tail_logmass also if the dataset has none.
    """

    input_ids: Tensor
    labels: Tensor
    num_valid: int
    ids: Tensor | None = None
    logprobs: Tensor | None = None
    tail_logmass: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """This batch on a device; itself if it is there."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, non_blocking=True)
        return replace(self, **moved)


def training_batches(
    split: Split,
    order: Order,
    *,
    first_step: int,
    step_sequences: int,
    micro_batch_sequences: int,
    columns: Sequence[str],
) -> Generator[Batch]:
    """Micro batches without end, from the optimizer step `first_step` on.

    A step's sequences are cut into micro batches of which the last may be smaller; none spans two
    steps. Closing the iterator ends what is decoded ahead.
    """
    rows = _rows_in_order(split, order, first_step * step_sequences, columns)
    with closing(rows):
        while True:
            left = step_sequences
            while left:
                size = min(left, micro_batch_sequences)
                yield make_batch(list(islice(rows, size)))
                left -= size


def sequential_batches(
    split: Split, *, batch_sequences: int, columns: Sequence[str]
) -> Iterator[Batch]:
    """All sequences once, in their own order. Closing the iterator ends what is decoded ahead."""
    numbers = range(split.num_row_groups)
    with closing(decode_ahead(split, numbers, columns, _ROW_GROUPS_AHEAD)) as row_groups:
        rows = _rows(row_groups)
        while batch := _next_batch(rows, batch_sequences):
            yield batch


def make_batch(places: Sequence[_Place]) -> Batch:
    """Pad rows of row groups to one batch, with the columns that were read."""
    num_positions = [_num_positions(group, r) for group, r in places]
    shape = (len(places), max(num_positions))
    input_ids = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    for b, ((group, r), length) in enumerate(zip(places, num_positions, strict=True)):
        first = require(TOKENS, group.token_offsets)[r]
        tokens = require(TOKENS, group.tokens)[first : first + length + 1]
        input_ids[b, :length] = tokens[:-1]
        labels[b, :length] = tokens[1:]
        if group.loss_mask is not None:
            counts = group.loss_mask[_positions(group, r)]
            labels[b, :length][~counts] = IGNORE_INDEX
    num_valid = int(np.count_nonzero(labels != IGNORE_INDEX))
    ids, logprobs = _entries(places, shape[1])
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        num_valid=num_valid,
        ids=ids,
        logprobs=logprobs,
        tail_logmass=_tail_logmass(places, shape),
    )


def _entries(
    places: Sequence[_Place], num_positions: int
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The kept entries, padded to the largest number at any position; None if not read."""
    if places[0][0].ids is None:
        return None, None
    runs = [
        Run(
            b * num_positions,
            require("ids", group.entry_offsets)[positions.start : positions.stop + 1],
            require("ids", group.ids),
            require("logprobs", group.logprobs),
        )
        for b, group, positions in _runs(places, num_positions)
    ]
    padded = pad_entries(runs, len(places) * num_positions)
    shape = (len(places), num_positions, padded[0].shape[1])
    return torch.from_numpy(padded[0].reshape(shape)), torch.from_numpy(padded[1].reshape(shape))


def _runs(places: Sequence[_Place], num_positions: int) -> Iterator[tuple[int, RowGroup, slice]]:
    """(index, row group, positions) of places, as one for rows that follow each other unpadded."""
    first = 0
    for b, (group, r) in enumerate(places):
        last = b + 1 == len(places)
        if not last and _num_positions(group, r) == num_positions:
            next_group, next_r = places[b + 1]
            if next_group is group and next_r == r + 1:
                continue
        start = _positions(*places[first]).start
        yield first, group, slice(start, _positions(group, r).stop)
        first = b + 1


def _tail_logmass(places: Sequence[_Place], shape: tuple[int, int]) -> Tensor | None:
    if places[0][0].tail_logmass is None:
        return None
    tails = np.full(shape, -np.inf, np.float32)
    for b, (group, r) in enumerate(places):
        row = require(TAIL_LOGMASS, group.tail_logmass)[_positions(group, r)]
        tails[b, : len(row)] = row
    return torch.from_numpy(tails)


def _positions(group: RowGroup, r: int) -> slice:
    offsets = require(TOKENS, group.position_offsets)
    return slice(int(offsets[r]), int(offsets[r + 1]))


def _num_positions(group: RowGroup, r: int) -> int:
    offsets = require(TOKENS, group.position_offsets)
    return int(offsets[r + 1] - offsets[r])


def _next_batch(rows: Iterator[_Place], size: int) -> Batch | None:
    """The next rows as a batch, None after the last; keeps no row group alive."""
    places = list(islice(rows, size))
    return make_batch(places) if places else None


def _rows(groups: Iterable[RowGroup]) -> Iterator[_Place]:
    for group in groups:
        for r in range(group.num_rows):
            yield group, r
        del group  # its memory is used again for one that is decoded next


def _rows_in_order(
    split: Split, order: Order, start: int, columns: Sequence[str]
) -> Generator[_Place]:
    """Rows without end."""
    numbers = (g for window in order.windows(start) for g in window.row_groups)
    with closing(decode_ahead(split, numbers, columns, _ROW_GROUPS_AHEAD)) as row_groups:
        for window in order.windows(start):
            groups = list(islice(row_groups, len(window.row_groups)))
            for member, offset in window.picks.tolist():
                yield groups[member], offset
            del groups  # before the next window is taken, not after
