"""Sequences from shards become padded batches, their kept entries ragged.

Letters: B lines, L positions of the longest of them.

A line of a batch (`lines.py`) is one sequence or several, each with the positions from 0 on, so
that attention stops at the joints. Packed lines are 99.7 % full and have the L of a full one, so
that nothing is compiled again for each.

Inputs are `tokens[:-1]` and labels `tokens[1:]`: the row holds the shift already, position t of
`ids` is the teacher's distribution over `labels[t]`, and nothing shifts again. Rows are padded at
their end, where causal attention keeps padding from everything that counts.

A row group's columns are views of Arrow's buffers; the only copy is into the batch. Columns that
were not requested are not read from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from shards.dataset import Split
from shards.row_group import RowGroup, require
from shards.schema import ENTROPIES, ENTRY_COLUMNS, LOSS_MASK, TAIL_LOGMASS, TOKENS
from student_train.data.lines import Line, Source, all_lines, lines_in_order, packed_length
from student_train.objective.kept_entries import KeptEntries, Run
from student_train.objective.loss import IGNORE_INDEX

TOKEN_COLUMNS = (TOKENS, LOSS_MASK)
TARGET_COLUMNS = (*TOKEN_COLUMNS, *ENTRY_COLUMNS)
TAIL_COLUMNS = (*TARGET_COLUMNS, TAIL_LOGMASS)


class _PlacedRow(NamedTuple):
    """Where a row begins among all positions of a batch, and its positions among its group's."""

    start: int
    group: RowGroup
    row: int
    positions: range


@dataclass(frozen=True, kw_only=True)
class Batch:
    """input_ids, labels [B, L] int64, the kept entries of their B L positions, line after line.

    labels are -100 where padded or where `loss_mask` is false; num_valid counts the others.
    tail_logmass and entropies [B, L] float32, nats, are padded with -inf and 0. What was not read
    is None, and so is a column that the dataset does not have. position_ids [B, L] int64 begin
    again with every packed sequence; None: each line is one. num_sequences are those of all lines,
    by the dataset that they are of.
    """

    input_ids: Tensor
    labels: Tensor
    num_valid: int
    num_sequences: tuple[int, ...]
    position_ids: Tensor | None = None
    entries: KeptEntries | None = None
    tail_logmass: Tensor | None = None
    entropies: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """This batch on a device; itself if it is there."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """This batch in memory from which a GPU can copy while it works."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(value)
            elif isinstance(value, KeptEntries):
                changed[field.name] = value.with_tensors(change)
        return replace(self, **changed)


def training_batches(
    sources: Sequence[Source],
    choices: Iterator[int],
    *,
    step_lines: int,
    micro_batch_lines: int,
    columns: Sequence[str],
) -> Generator[Batch]:
    """Micro batches without end, those of whole steps.

    `choices` gives the source of every line. A step's lines are cut into micro batches; the last
    may be smaller, and none spans two steps. Closing the iterator ends decoding ahead.
    """
    lengths = [packed_length(source.split.spec) for source in sources]
    packed = next((length for length in lengths if length is not None), None)
    with ExitStack() as stack:
        lines = [stack.enter_context(closing(lines_in_order(s, columns))) for s in sources]
        while True:
            left = step_lines
            while left:
                size = min(left, micro_batch_lines)
                yield _mixed_batch(lines, list(islice(choices, size)), packed)
                left -= size


def sequential_batches(
    split: Split,
    *,
    batch_lines: int,
    columns: Sequence[str],
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Batch]:
    """All sequences once, in their own order unless they are packed.

    One of several ranks gets those of every `world_size`th row group.
    Closing the iterator ends what is decoded ahead.
    """
    packed = packed_length(split.spec)
    with closing(all_lines(split, columns, rank, world_size)) as lines:
        while batch := _next_batch(lines, batch_lines, packed):
            yield batch


def for_device(batches: Generator[Batch], device: torch.device) -> Generator[Batch]:
    """The same batches, pinned if it is a GPU; to be read ahead, as pinning is a copy."""
    with closing(batches):
        for batch in batches:
            yield batch.pinned() if device.type == "cuda" else batch


def make_batch(
    lines: Sequence[Line], *, packed: int | None, num_sequences: tuple[int, ...]
) -> Batch:
    """Pad lines of rows to one batch, with the columns that were read.

    `packed` are the positions of a full line of several sequences; None: each line is one.
    """
    positions = [[_positions(group, r) for group, r in line] for line in lines]
    width = max(sum(map(len, line)) for line in positions) if packed is None else packed
    shape = (len(lines), width)
    rows = list(_placed_rows(lines, positions, shape[1]))
    size = shape[0] * shape[1]
    input_ids = np.zeros(size, np.int64)
    labels = np.full(size, IGNORE_INDEX, np.int64)
    num_valid = 0
    for start, group, r, span in rows:
        length = len(span)
        first = require(TOKENS, group.token_offsets)[r]
        tokens = require(TOKENS, group.tokens)[first : first + length + 1]
        input_ids[start : start + length] = tokens[:-1]
        labels[start : start + length] = tokens[1:]
        num_valid += length
        if group.loss_mask is not None:
            masked = ~group.loss_mask[span.start : span.stop]
            labels[start : start + length][masked] = IGNORE_INDEX
            num_valid -= int(np.count_nonzero(masked))
    return Batch(
        input_ids=torch.from_numpy(input_ids.reshape(shape)),
        labels=torch.from_numpy(labels.reshape(shape)),
        num_valid=num_valid,
        num_sequences=num_sequences,
        position_ids=None if packed is None else _position_ids(positions, shape),
        entries=_entries(rows, size),
        tail_logmass=_per_position(rows, shape, TAIL_LOGMASS, -np.inf),
        entropies=_per_position(rows, shape, ENTROPIES, 0.0),
    )


def _placed_rows(
    lines: Sequence[Line], positions: Sequence[Sequence[range]], width: int
) -> Iterator[_PlacedRow]:
    """Where the rows of all lines are in the flat batch."""
    for b, line in enumerate(lines):
        start = b * width
        for (group, r), span in zip(line, positions[b], strict=True):
            yield _PlacedRow(start, group, r, span)
            start += len(span)


def _position_ids(positions: Sequence[Sequence[range]], shape: tuple[int, int]) -> Tensor:
    """Positions from 0 on for every row of a line, and for the padding after them."""
    position_ids = np.empty(shape, np.int64)
    for b, line in enumerate(positions):
        lengths = list(map(len, line))
        parts = [*lengths, shape[1] - sum(lengths)]
        position_ids[b] = np.concatenate([np.arange(length) for length in parts])
    return torch.from_numpy(position_ids)


def _entries(rows: Sequence[_PlacedRow], size: int) -> KeptEntries | None:
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


def _runs(rows: Sequence[_PlacedRow]) -> Iterator[tuple[int, RowGroup, range]]:
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


def _per_position(
    rows: Sequence[_PlacedRow], shape: tuple[int, int], column: str, padding: float
) -> Tensor | None:
    """A column of one number per position [B, L]; None if it is missing or was not read."""
    if getattr(rows[0].group, column) is None:
        return None
    padded = np.full(shape[0] * shape[1], padding, np.float32)
    for start, group, _, span in rows:
        values = require(column, getattr(group, column))[span.start : span.stop]
        padded[start : start + len(values)] = values
    return torch.from_numpy(padded.reshape(shape))


def _positions(group: RowGroup, r: int) -> range:
    """The positions of a row among all of its row group."""
    offsets = require(TOKENS, group.position_offsets)
    return range(int(offsets[r]), int(offsets[r + 1]))


def _next_batch(lines: Iterator[Line], size: int, packed: int | None) -> Batch | None:
    """The next lines as a batch, None after the last; keeps no row group alive."""
    batch_lines = list(islice(lines, size))
    if not batch_lines:
        return None
    return make_batch(batch_lines, packed=packed, num_sequences=(sum(map(len, batch_lines)),))


def _mixed_batch(
    sources: Sequence[Iterator[Line]], chosen: Sequence[int], packed: int | None
) -> Batch:
    """The next line of every chosen source; keeps no row group alive."""
    lines = [next(sources[number]) for number in chosen]
    num_sequences = [0] * len(sources)
    for number, line in zip(chosen, lines, strict=True):
        num_sequences[number] += len(line)
    return make_batch(lines, packed=packed, num_sequences=tuple(num_sequences))
