"""Sequences of a split become lines of a batch, in the order of training or in their own.

A line is one sequence, or, of a dataset of separate documents, as many of one row group as fit
(`packing.py`). Whatever the size of the dataset, memory holds the row groups of one window that
this process reads, and at most as many decoded ahead; each of several datasets has its own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from shards.closing import Closing
from shards.dataset import Split
from shards.row_group import RowGroup, require
from shards.schema import POSITIONS, TOKENS
from shards.spec import DatasetSpec
from student_train.data.decode_ahead import decode_ahead
from student_train.data.order import START, Order, Position, Window
from student_train.data.packing import pack
from student_train.data.plan import DealtLine, members_of

# While a window becomes batches, the next one is decoded. At 54 entries per position, 60 MB a row
# group, half of it ahead is as fast as all; at 12, in the order of training, less is slower.
_MANY_ENTRIES = 24

# How many row groups an evaluation, which needs one at a time, has decoded in advance.
_AHEAD_IN_ORDER = 4

Place = tuple[RowGroup, int]  # a row group and a row of it
Line = Sequence[Place]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A split to train on, the order of its row groups, and where the stream begins."""

    split: Split
    order: Order
    start: Position

    @classmethod
    def of(
        cls, split: Split, *, seed: int, window_row_groups: int, start: Position = START
    ) -> Self:
        """A split in the order that belongs to a seed and a number of row groups at once."""
        order = Order(
            num_sequences=split.num_sequences,
            layout=split.spec.layout,
            seed=seed,
            window_row_groups=window_row_groups,
        )
        return cls(split=split, order=order, start=start)


def packed_length(spec: DatasetSpec) -> int | None:
    """Positions of a line into which sequences of the dataset are packed; None: they are not."""
    return None if spec.documents.joined else spec.sequence_length


class LineCounts(Closing):
    """How many lines the members of a window have; a context manager that closes.

    Packed lines are counted from the lengths of the sequences alone, 4 bytes for each.
    """

    def __init__(self, split: Split) -> None:
        self._split = split.reopened()
        self._length = packed_length(split.spec)

    def __call__(self, window: Window) -> Sequence[int]:
        """One number per member. ShardError if a shard cannot be read."""
        if self._length is None:
            return window.sizes
        return [self._packed(g, self._length) for g in window.row_groups]

    def close(self) -> None:
        """Close the files."""
        self._split.close()

    def _packed(self, row_group: int, length: int) -> int:
        group = self._split.read_row_group(row_group, [POSITIONS], use_threads=False)
        return len(pack(require(POSITIONS, group.positions), length))


class OwnLines(Closing):
    """The lines that a rank takes of a source, from its row groups; a context manager that closes.

    Closing waits for what is being decoded.
    """

    def __init__(
        self, source: Source, columns: Sequence[str], *, rank: int, world_size: int
    ) -> None:
        self._length = packed_length(source.split.spec)
        self._rank, self._world_size = rank, world_size
        self._windows = source.order.windows(source.start)
        self._window: Window | None = None
        self._groups: dict[int, RowGroup] = {}
        self._lines: dict[int, list[list[int]]] = {}
        numbers = (
            window.row_groups[member]
            for window in source.order.windows(source.start)
            for member in self._members(window)
        )
        held = len(members_of(0, source.order.num_members, world_size))
        ahead = _row_groups_ahead(source.split, held)
        self._decoded = decode_ahead(source.split, numbers, columns, ahead)

    def take(self, line: DealtLine) -> Line:
        """The rows of a line that this rank takes. Ask for lines in the order of the plan.

        ShardError if the shard cannot be read.
        """
        while self._window != line.window:
            self._next_window()
        group = self._groups[line.member]
        return [(group, r) for r in self._lines[line.member][line.line_of_member]]

    def close(self) -> None:
        """Forget the row groups and end decoding ahead."""
        self._groups.clear()
        self._decoded.close()

    def _members(self, window: Window) -> range:
        return members_of(self._rank, len(window.row_groups), self._world_size)

    def _next_window(self) -> None:
        self._groups.clear()  # before the next ones are taken, not after
        window = self._window = next(self._windows)
        for member in self._members(window):
            group = self._groups[member] = next(self._decoded)
            self._lines[member] = _shuffled_lines(window, member, group, self._length)


def all_lines(
    split: Split, columns: Sequence[str], rank: int = 0, world_size: int = 1
) -> Generator[Line]:
    """All sequences once, in their own order unless they are packed. Close it, too.

    One of several ranks gets those of every `world_size`th row group.
    """
    numbers = range(rank, split.num_row_groups, world_size)
    ahead = _row_groups_ahead(split, min(_AHEAD_IN_ORDER, len(numbers)))
    with closing(decode_ahead(split, numbers, columns, ahead)) as row_groups:
        yield from _lines(row_groups, packed_length(split.spec))


def _row_groups_ahead(split: Split, most: int) -> int:
    """How many row groups are decoded in advance: `most`, or half of many entries."""
    first = next(iter(split.sidecars()), None)
    many = first is not None and first.entries > _MANY_ENTRIES * first.tokens
    return max(1, -(-most // 2) if many else most)


def _lines(groups: Iterable[RowGroup], length: int | None) -> Iterator[Line]:
    """All rows of row groups: each a line, or packed into lines of this length."""
    for group in groups:
        if length is None:
            packed = [[r] for r in range(group.num_rows)]
        else:
            packed = pack(_lengths(group), length)
        for line in packed:
            yield [(group, r) for r in line]
        del group  # its memory is used again for one that is decoded next


def _shuffled_lines(
    window: Window, member: int, group: RowGroup, length: int | None
) -> list[list[int]]:
    """The lines of a member as rows, in the order of training.

    Their number is that of `LineCounts`: it depends on the lengths, not on their order. Packed
    lines come in an order of their own: as they are packed, full ones would come first.
    """
    rows = window.shuffled_rows(member)
    if length is None:
        return [[r] for r in rows.tolist()]
    packed = pack(_lengths(group)[rows], length)
    return [rows[packed[i]].tolist() for i in window.shuffled_lines(member, len(packed)).tolist()]


def _lengths(group: RowGroup) -> npt.NDArray[np.integer]:
    """Positions of every row."""
    return np.diff(require(TOKENS, group.position_offsets))
