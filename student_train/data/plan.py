"""Which rank reads which row group, and takes which line in which step: numbers, and no files.

The lines of a window are dealt in turn over its members that have lines left: the first line of
every member, the second of every member, and so on. That order is the same for any number of ranks.
With W ranks, rank r reads the members m with m mod W = r and takes their lines. If a window has
fewer members than ranks, several ranks read one member and take its lines in turn.

All ranks make the same number of micro batches in a step, because a rank that shares a model with
others must run it as often as they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from student_train.data.order import Order, Position, Window

_T = TypeVar("_T")
_Numbers = npt.NDArray[np.int64]


class DealtLine(NamedTuple):
    """A line: which one of a member of a window, the rank that takes it, its number there.

    The lines of a member are numbered from 0, and so are the `num_lines` of the window.
    """

    window: Window
    member: int
    line_of_member: int
    rank: int
    line: int
    num_lines: int

    @property
    def position(self) -> Position:
        """Where the stream is after this line."""
        done, window = self.line + 1, self.window
        if done == self.num_lines:
            return window.next_start
        return Position(epoch=window.epoch, window=window.number, line=done)


def deal(counts: Sequence[int]) -> tuple[_Numbers, _Numbers]:
    """(member, line of that member) [N] of a window whose members have these numbers of lines."""
    members = np.repeat(np.arange(len(counts)), counts)
    lines = np.concatenate([np.arange(count) for count in counts])
    order = np.lexsort((members, lines))
    return members[order], lines[order]


def ranks_of(members: _Numbers, lines: _Numbers, num_members: int, world_size: int) -> _Numbers:
    """The rank that takes each line [N] of a window."""
    if world_size <= num_members:
        return members % world_size
    num_readers = -(-(world_size - members) // num_members)
    return members + num_members * (lines % num_readers)


def members_of(rank: int, num_members: int, world_size: int) -> range:
    """The members of a window that a rank reads."""
    first = rank % num_members
    return range(first, first + 1 if world_size > num_members else num_members, world_size)


def dealt_lines(
    order: Order,
    start: Position,
    count_lines: Callable[[Window], Sequence[int]],
    world_size: int,
) -> Iterator[DealtLine]:
    """All lines from a position on, without end. `count_lines` says how many each member has.

    ValueError for a position that the order does not have.
    """
    skip = start.line
    for window in order.windows(start):
        members, lines = deal(count_lines(window))
        num_lines = len(members)
        if not 0 <= skip < num_lines:
            raise ValueError(f"line {skip} of {num_lines} in window {window.number}")
        ranks = ranks_of(members, lines, len(window.row_groups), world_size)
        columns = (members[skip:], lines[skip:], ranks[skip:])
        for number, (member, line, rank) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), start=skip
        ):
            yield DealtLine(window, member, line, rank, number, num_lines)
        skip = 0


class Pick(NamedTuple):
    """The dataset that a line is of, the line, and its number among all lines of its step."""

    dataset: int
    line: DealtLine
    number: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one rank does in a step: micro batches of lines, and where each dataset is after it.

    A micro batch without lines comes after all others. The positions are those of all ranks.
    """

    micro_batches: Sequence[Sequence[Pick]]
    positions: tuple[Position, ...]


def plan_steps(
    lines: Sequence[Iterator[DealtLine]],
    starts: Sequence[Position],
    choices: Iterator[int],
    *,
    step_lines: int,
    micro_batch_lines: int,
    rank: int,
    world_size: int,
) -> Iterator[Step]:
    """The steps of a rank, without end, from the lines of every dataset.

    `starts` are the positions of the datasets, `choices` gives the dataset of every line.
    """
    positions = list(starts)
    while True:
        own: list[Pick] = []
        counts = [0] * world_size
        last: dict[int, DealtLine] = {}
        for number, dataset in enumerate(islice(choices, step_lines)):
            line = last[dataset] = next(lines[dataset])
            counts[line.rank] += 1
            if line.rank == rank:
                own.append(Pick(dataset, line, number))
        for dataset, line in last.items():
            positions[dataset] = line.position
        num_batches = -(-max(counts) // micro_batch_lines)
        yield Step(micro_batches=split_evenly(own, num_batches), positions=tuple(positions))


def split_evenly(items: Sequence[_T], num_parts: int) -> list[Sequence[_T]]:
    """Parts whose sizes differ by at most one, the larger ones first."""
    size, larger = divmod(len(items), num_parts)
    ends = np.cumsum([size + (part < larger) for part in range(num_parts)]).tolist()
    return [items[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def how_to_even_out(num_members: int, num_row_groups: int, world_size: int) -> str | None:
    """Why ranks get unequal numbers of lines, or read a row group twice, and what to change.

    None if windows of this many members divide evenly among the ranks.
    """
    if num_members % world_size == 0:
        return None
    number = -(-num_members // world_size) * world_size
    if number > num_row_groups:
        return (
            f"{world_size} ranks read {num_row_groups} row groups, so some ranks get more lines"
            " than others or read the same row group"
        )
    reason = "some ranks get more lines than others"
    if world_size > num_members:
        reason = "several ranks read the same row group"
    return (
        f"{world_size} ranks read windows of {num_members} row groups, so {reason};"
        f" --window-row-groups {number} avoids this"
    )
