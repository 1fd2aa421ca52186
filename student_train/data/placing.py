"""Where the rows of a batch stand in it, and their columns there: padded arrays from row groups.

Letters: B lines, L positions of each, N = B L of all, line after line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shards.row_group import RowGroup, require
from shards.schema import TOKENS
from student_train.data.lines import Line
from student_train.objective.kept_entries import KeptEntries, Run


class PlacedRow(NamedTuple):
    """Where a row begins among all positions of a batch, and its positions among its group's."""

    start: int
    group: RowGroup
    row: int
    positions: range


def placed_rows(
    lines: Sequence[Line], positions: Sequence[Sequence[range]], width: int
) -> Iterator[PlacedRow]:
    """Where the rows of all lines are in the flat batch."""
    for b, line in enumerate(lines):
        start = b * width
        for (group, r), span in zip(line, positions[b], strict=True):
            yield PlacedRow(start, group, r, span)
            start += len(span)


def position_ids_of(positions: Sequence[Sequence[range]], shape: tuple[int, int]) -> Tensor:
    """Positions from 0 on for every row of a line, and for the padding after them."""
    position_ids = np.empty(shape, np.int64)
    for b, line in enumerate(positions):
        lengths = list(map(len, line))
        parts = [*lengths, shape[1] - sum(lengths)]
        position_ids[b] = np.concatenate([np.arange(length) for length in parts])
    return torch.from_numpy(position_ids)


def entries_of(rows: Sequence[PlacedRow], size: int) -> KeptEntries | None:
    """Those of all positions; None if not read."""
    if rows[0].group.ids is None:
        return None
    return KeptEntries.gather((_run(*run) for run in _runs(rows)), size)


def _run(start: int, group: RowGroup, span: range) -> Run:
    counts = group.entry_counts[span.start : span.stop]
    offsets = require("ids", group.entry_offsets)
    entries = slice(offsets[span.start], offsets[span.stop])
    ids, logprobs = require("ids", group.ids), require("logprobs", group.logprobs)
    return Run(start, counts, ids[entries], logprobs[entries])


def _runs(rows: Sequence[PlacedRow]) -> Iterator[tuple[int, RowGroup, range]]:
    """(start, row group, positions), one for rows that follow each other here and there."""
    start, group, _, span = rows[0]
    for row in rows[1:]:
        follows = row.start == start + len(span) and row.positions.start == span.stop
        if follows and row.group is group:
            span = range(span.start, row.positions.stop)
            continue
        yield start, group, span
        start, group, _, span = row
    yield start, group, span


def per_position(
    rows: Sequence[PlacedRow], shape: tuple[int, int], column: str, padding: float
) -> Tensor | None:
    """A column of one number per position [B, L]; None if it is missing or was not read."""
    if getattr(rows[0].group, column) is None:
        return None
    padded = np.full(shape[0] * shape[1], padding, np.float32)
    for start, group, _, span in rows:
        values = require(column, getattr(group, column))[span.start : span.stop]
        padded[start : start + len(values)] = values
    return torch.from_numpy(padded.reshape(shape))


def positions_of(group: RowGroup, r: int) -> range:
    """The positions of a row among all of its row group."""
    offsets = require(TOKENS, group.position_offsets)
    return range(int(offsets[r]), int(offsets[r + 1]))
