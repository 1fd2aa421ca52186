"""Sequences of a split become lines of a batch, in the order of training or in their own.

A line is one sequence, or, of a dataset of separate documents, as many as fit (`packing.py`).
Whatever the size of the dataset, memory holds the order's window of row groups and at most as many
decoded ahead; each of several datasets has its own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, tee
from typing import Self

import numpy as np

from shards.dataset import Split
from shards.row_group import RowGroup, require
from shards.schema import TOKENS
from shards.spec import DatasetSpec
from student_train.data.decode_ahead import decode_ahead
from student_train.data.order import GROUPS_PER_WINDOW, Order, Window
from student_train.data.packing import after, pack

# While a window becomes batches, the next one is decoded. At 54 entries per position, 60 MB a row
# group, half of it ahead is as fast as all; at 12, in the order of training, less is slower.
_MANY_ENTRIES = 24

Place = tuple[RowGroup, int]  # a row group and a row of it
Line = Sequence[Place]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A split to train on, the order of its sequences, and how many of them came before."""

    split: Split
    order: Order
    start: int

    @classmethod
    def of(cls, split: Split, *, seed: int, start: int = 0) -> Self:
        """A split in the order that belongs to a seed."""
        order = Order(num_sequences=split.num_sequences, layout=split.spec.layout, seed=seed)
        return cls(split=split, order=order, start=start)


def packed_length(spec: DatasetSpec) -> int | None:
    """Positions of a line into which sequences of the dataset are packed; None: they are not."""
    return None if spec.documents.joined else spec.sequence_length


def lines_in_order(source: Source, columns: Sequence[str]) -> Generator[Line]:
    """Lines for training, without end. Closing the iterator ends what is decoded ahead."""
    length = packed_length(source.split.spec)
    windows, windows_ahead = tee(source.order.windows(source.start))
    numbers = (g for window in windows_ahead for g in window.row_groups)
    ahead = _row_groups_ahead(source.split)
    with closing(decode_ahead(source.split, numbers, columns, ahead)) as row_groups:
        for window in windows:
            groups = list(islice(row_groups, len(window.row_groups)))
            for line in _lines_of(window, groups, length):
                yield [(groups[member], offset) for member, offset in line]
            del groups  # before the next window is taken, not after


def all_lines(
    split: Split, columns: Sequence[str], rank: int = 0, world_size: int = 1
) -> Generator[Line]:
    """All sequences once, in their own order unless they are packed. Close it, too.

    One of several ranks gets those of every `world_size`th row group.
    """
    numbers = range(rank, split.num_row_groups, world_size)
    with closing(decode_ahead(split, numbers, columns, _row_groups_ahead(split))) as row_groups:
        yield from _lines(row_groups, packed_length(split.spec))


def _row_groups_ahead(split: Split) -> int:
    """How many row groups are decoded in advance: those of a window, or half of many entries."""
    first = next(iter(split.sidecars()), None)
    many = first is not None and first.entries > _MANY_ENTRIES * first.tokens
    window = max(1, min(GROUPS_PER_WINDOW, split.num_row_groups))
    return -(-window // 2) if many else window


def _lines(groups: Iterable[RowGroup], length: int | None) -> Iterator[Line]:
    """All rows of row groups: each a line, or packed into lines of this length."""
    for group in groups:
        if length is None:
            packed = [[r] for r in range(group.num_rows)]
        else:
            packed = pack(np.diff(require(TOKENS, group.position_offsets)), length)
        for line in packed:
            yield [(group, r) for r in line]
        del group  # its memory is used again for one that is decoded next


def _lines_of(
    window: Window, groups: Sequence[RowGroup], length: int | None
) -> Iterator[list[list[int]]]:
    """The window's lines in the order of training, each a list of picks.

    Packed lines come in an order of their own: as they are packed, full ones would come first.
    """
    if length is None:
        yield from ([pick] for pick in window.picks[window.skip :].tolist())
        return
    lengths = [np.diff(require(TOKENS, group.position_offsets)) for group in groups]
    packed = pack(np.array([lengths[member][r] for member, r in window.picks.tolist()]), length)
    shuffled = [packed[line] for line in window.shuffled(len(packed)).tolist()]
    for line in after(shuffled, window.skip):
        yield window.picks[line].tolist()
