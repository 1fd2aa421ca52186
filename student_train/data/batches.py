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

import logging
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from shards.dataset import Split
from shards.row_group import require
from shards.schema import ENTROPIES, ENTRY_COLUMNS, IDS, LOSS_MASK, TAIL_LOGMASS, TOKENS
from student_train.data.lines import Line, LineCounts, OwnLines, Source, all_lines, packed_length
from student_train.data.order import Position
from student_train.data.placing import (
    entries_of,
    per_position,
    placed_rows,
    position_ids_of,
    positions_of,
)
from student_train.data.plan import Pick, dealt_lines, how_to_even_out, plan_steps
from student_train.data.whole_lines import WholeLine, whole_lines
from student_train.objective.distillation import Objective, Targets
from student_train.objective.kept_entries import KeptEntries
from student_train.objective.loss import IGNORE_INDEX

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = (TOKENS, LOSS_MASK)
TARGET_COLUMNS = (*TOKEN_COLUMNS, *ENTRY_COLUMNS)
TAIL_COLUMNS = (*TARGET_COLUMNS, TAIL_LOGMASS)

_EMPTY_POSITIONS = 8


@dataclass(frozen=True, kw_only=True)
class Batch:
    """input_ids, labels [B, L] int64, the kept entries of their B L positions, line after line.

    labels are -100 where padded or where `loss_mask` is false; num_valid counts the others.
    tail_logmass and entropies [B, L] float32, nats, are padded with -inf and 0. What was not read
    is None, and so is a column that the dataset does not have. position_ids [B, L] int64 begin
    again with every packed sequence; None: each line is one. num_sequences are those of all lines,
    by the dataset that they are of. The last batch of an optimizer step, and no other, has
    positions: where each dataset is after the step, of all ranks. `lines` are the sequences of the
    B lines as their datasets have them, if the segments were read.
    """

    input_ids: Tensor
    labels: Tensor
    num_valid: int
    num_sequences: tuple[int, ...]
    position_ids: Tensor | None = None
    entries: KeptEntries | None = None
    tail_logmass: Tensor | None = None
    entropies: Tensor | None = None
    positions: tuple[Position, ...] | None = None
    lines: tuple[WholeLine, ...] = ()

    def targets(self, objective: Objective) -> Targets | None:
        """The targets of all B L positions; None if there are none, or the objective needs none."""
        if not objective.alpha or self.entries is None:
            return None
        tail = self.tail_logmass if objective.bucket else None
        entropies = self.entropies
        return Targets(
            self.entries,
            None if tail is None else tail.flatten(),
            None if entropies is None else entropies.flatten(),
        )

    def padded_entries(self) -> tuple[Tensor, Tensor]:
        """ids [B, L, K] int64 and logprobs [B, L, K] float32, padded with any id and -inf.

        K is the most entries at any position. ValueError if they were not read.
        """
        entries, size = require(IDS, self.entries), self.labels.numel()
        shape = (*self.labels.shape, entries.max_entries)
        if not entries.max_entries:
            return entries.ids.new_zeros(shape).long(), entries.logprobs.new_zeros(shape)
        rows = torch.arange(size, device=self.labels.device)
        ids, logprobs = entries.padded(rows)
        return ids.long().view(shape), logprobs.view(shape)

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
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Batch]:
    """Micro batches of one rank without end, those of whole steps.

    `choices` gives the source of every line of all ranks, `step_lines` of them a step. In each step
    all ranks get the same number of micro batches, of at most `micro_batch_lines`. A rank without
    lines for one gets a batch that counts nothing: its loss and gradients are 0. The last batch of
    a step has `positions`. Closing the iterator ends decoding ahead.
    """
    if rank == 0:
        _log_sharing(sources, world_size)
    lengths = [packed_length(source.split.spec) for source in sources]
    packed = next((length for length in lengths if length is not None), None)
    read = set(columns).intersection(*(source.split.spec.columns for source in sources))
    empty = empty_batch(read, packed=packed, num_sources=len(sources))
    with ExitStack() as stack:
        lines = [
            stack.enter_context(OwnLines(source, columns, rank=rank, world_size=world_size))
            for source in sources
        ]
        counts = [stack.enter_context(LineCounts(source.split)) for source in sources]
        steps = plan_steps(
            [
                dealt_lines(source.order, source.start, count, world_size)
                for source, count in zip(sources, counts, strict=True)
            ],
            [source.start for source in sources],
            choices,
            step_lines=step_lines,
            micro_batch_lines=micro_batch_lines,
            rank=rank,
            world_size=world_size,
        )
        for step in steps:
            last = len(step.micro_batches) - 1
            for number, picks in enumerate(step.micro_batches):
                batch = _mixed_batch(lines, picks, packed) if picks else empty
                yield replace(batch, positions=step.positions) if number == last else batch


def step_batches(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The micro batches of the next step; its last one has `positions`."""
    for batch in batches:
        yield batch
        if batch.positions is not None:
            return


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
    positions = [[positions_of(group, r) for group, r in line] for line in lines]
    width = max(sum(map(len, line)) for line in positions) if packed is None else packed
    shape = (len(lines), width)
    rows = list(placed_rows(lines, positions, shape[1]))
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
        position_ids=None if packed is None else position_ids_of(positions, shape),
        entries=entries_of(rows, size),
        tail_logmass=per_position(rows, shape, TAIL_LOGMASS, -np.inf),
        entropies=per_position(rows, shape, ENTROPIES, 0.0),
    )


def _next_batch(lines: Iterator[Line], size: int, packed: int | None) -> Batch | None:
    """The next lines as a batch, None after the last; keeps no row group alive."""
    batch_lines = list(islice(lines, size))
    if not batch_lines:
        return None
    return make_batch(batch_lines, packed=packed, num_sequences=(sum(map(len, batch_lines)),))


def _mixed_batch(sources: Sequence[OwnLines], picks: Sequence[Pick], packed: int | None) -> Batch:
    """The lines of a micro batch; keeps no row group alive."""
    lines = [sources[pick.dataset].take(pick.line) for pick in picks]
    num_sequences = [0] * len(sources)
    for pick, line in zip(picks, lines, strict=True):
        num_sequences[pick.dataset] += len(line)
    batch = make_batch(lines, packed=packed, num_sequences=tuple(num_sequences))
    return replace(batch, lines=whole_lines([pick.number for pick in picks], lines))


def empty_batch(columns: Container[str], *, packed: int | None, num_sources: int = 1) -> Batch:
    """One line in which nothing counts, with these columns: its loss and gradients are 0.

    A packed one is as long as all others, so that nothing is compiled for it.
    """
    shape = (1, _EMPTY_POSITIONS if packed is None else packed)
    return Batch(
        input_ids=torch.zeros(shape, dtype=torch.int64),
        labels=torch.full(shape, IGNORE_INDEX),
        num_valid=0,
        num_sequences=(0,) * num_sources,
        position_ids=None if packed is None else torch.arange(packed)[None],
        entries=KeptEntries.gather((), shape[1]) if IDS in columns else None,
        tail_logmass=torch.full(shape, -torch.inf) if TAIL_LOGMASS in columns else None,
        entropies=torch.zeros(shape) if ENTROPIES in columns else None,
    )


def _log_sharing(sources: Sequence[Source], world_size: int) -> None:
    for source in sources:
        split, order = source.split, source.order
        advice = how_to_even_out(order.num_members, split.num_row_groups, world_size)
        if advice is not None:
            logger.info("%s: %s", split.path, advice)
