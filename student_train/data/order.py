"""The order of row groups in training: a function of seed, epoch and number, found by arithmetic.

An epoch permutes the row groups and cuts the permutation into windows of a few. The lines of a
window's row groups, its members, are dealt in turn (`plan.py`). So a reader holds one window, every
sequence comes exactly once per epoch, and a run can start at any position of the stream: resuming
needs three numbers, not a state. The number of processes plays no part in it.

This costs 4 bytes per row group during an epoch, 32 MB for a trillion tokens (30 bytes for a moment
when it begins), and the shuffle is complete only inside a window.

Random numbers are raw output of PCG64, which numpy promises never to change, unlike the methods of
its Generator: a run can be resumed with another numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.layout import Layout

# What a permutation is of, so that no two of them have the same random numbers.
_ROW_GROUPS, _ROWS, _LINES = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far the stream of a dataset is: lines that are done in a window of an epoch."""

    epoch: int
    window: int
    line: int


START = Position(epoch=0, window=0, line=0)


@dataclass(frozen=True, kw_only=True)
class Window:
    """The row groups whose lines are dealt together, its members, and their sizes in sequences."""

    seed: int
    epoch: int
    number: int
    is_last: bool
    row_groups: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def next_start(self) -> Position:
        """Where the stream is when this window is done."""
        if self.is_last:
            return Position(epoch=self.epoch + 1, window=0, line=0)
        return Position(epoch=self.epoch, window=self.number + 1, line=0)

    def shuffled_rows(self, member: int) -> npt.NDArray[np.intp]:
        """A permutation of the rows of a member."""
        return _permutation(self.sizes[member], _ROWS, self.seed, self.epoch, self.number, member)

    def shuffled_lines(self, member: int, num_lines: int) -> npt.NDArray[np.intp]:
        """A permutation of the packed lines of a member."""
        return _permutation(num_lines, _LINES, self.seed, self.epoch, self.number, member)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The endless stream of a split's row groups, epoch after epoch, `window_row_groups` at once.

    ValueError for a window of none.
    """

    num_sequences: int
    layout: Layout
    seed: int
    window_row_groups: int
    _permuted: dict[int, npt.NDArray[np.unsignedinteger[Any]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.window_row_groups < 1:
            raise ValueError(f"windows of {self.window_row_groups} row groups")

    @property
    def num_members(self) -> int:
        """Row groups of a full window."""
        return min(self.window_row_groups, self.layout.num_row_groups(self.num_sequences))

    def windows(self, start: Position) -> Iterator[Window]:
        """The windows from that of a position on. ValueError for a position that no epoch has."""
        epoch, first = start.epoch, start.window
        while True:
            yield from self._epoch(epoch, first)
            epoch, first = epoch + 1, 0

    def _groups(self, epoch: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """The permutation of an epoch. Several readers of one order share it."""
        groups = self._permuted.get(epoch)
        if groups is None:
            num_groups = self.layout.num_row_groups(self.num_sequences)
            permutation = _permutation(num_groups, _ROW_GROUPS, self.seed, epoch)
            groups = self._permuted[epoch] = permutation.astype(np.min_scalar_type(num_groups))
            for old in sorted(self._permuted)[:-2]:  # one reader may be in the next epoch already
                del self._permuted[old]
        return groups

    def _epoch(self, epoch: int, first: int) -> Iterator[Window]:
        num_groups = self.layout.num_row_groups(self.num_sequences)
        num_windows = -(-num_groups // self.window_row_groups)
        if not 0 <= first < num_windows:
            raise ValueError(f"window {first} of {num_windows} in an epoch")
        groups = self._groups(epoch)
        for number in range(first, num_windows):
            members = groups[number * self.window_row_groups :][: self.window_row_groups]
            yield Window(
                seed=self.seed,
                epoch=epoch,
                number=number,
                is_last=number == num_windows - 1,
                row_groups=tuple(members.tolist()),
                sizes=tuple(
                    len(self.layout.row_group_range(g, self.num_sequences))
                    for g in members.tolist()
                ),
            )


def _permutation(length: int, *key: int) -> npt.NDArray[np.intp]:
    """A permutation of 0 to length - 1 that these numbers determine."""
    random = np.random.PCG64(np.random.SeedSequence(key))
    return np.argsort(random.random_raw(length), kind="stable")
