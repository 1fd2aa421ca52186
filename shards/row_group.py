"""A row group in memory: the columns of R sequences as flat arrays, the same for writer and reader.

Letters: R sequences, n tokens of one of them, P labelled positions and E kept entries of all.

A ragged column is a flat array and the offsets of its pieces, as in Arrow. So a group that was read
consists of views of Arrow's buffers, without copies or padding. A writer's group has every column;
in a reader's, columns that were not requested are None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from shards.rows import BoolArray, Float32Array, Int32Array, Row

Int64Array = npt.NDArray[np.int64]
Offsets = npt.NDArray[np.signedinteger]  # int64 as they are made, Arrow's int32 as they are read
_T = TypeVar("_T")
_Scalar = TypeVar("_Scalar", bound=np.generic)

# Columns whose values lie end to end in a group.
_FLAT = ("tokens", "segments", "ids", "logprobs", "tail_logmass", "label_logprobs", "entropies",
         "loss_mask")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Counts and sums (nats) over sequences; `tokens` are labelled positions that count.

    `teacher_nll`, `kept_mass` and `teacher_entropy` are None where any part does not have them.
    """

    sequences: int = 0
    tokens: int = 0
    entries: int = 0
    teacher_nll: float | None = 0.0
    teacher_entropy: float | None = 0.0
    kept_mass: float | None = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            sequences=self.sequences + other.sequences,
            tokens=self.tokens + other.tokens,
            entries=self.entries + other.entries,
            teacher_nll=_sum_of_both(self.teacher_nll, other.teacher_nll),
            teacher_entropy=_sum_of_both(self.teacher_entropy, other.teacher_entropy),
            kept_mass=_sum_of_both(self.kept_mass, other.kept_mass),
        )


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """R sequences: sequences [R] int64, ids [E] int32, logprobs [E] float32, nats.

    Row r has tokens and segments `[token_offsets[r] : token_offsets[r + 1]]` and the positions
    `[position_offsets[r] : position_offsets[r + 1]]` (P in all) of tail_logmass, label_logprobs,
    entropies and loss_mask; position p has entries `[entry_offsets[p] : entry_offsets[p + 1]]`
    (E in all) of ids and logprobs. positions, the number of those of each row, teacher_nll and
    teacher_entropy are [R]. Offsets are `Offsets`.
    """

    sequences: Int64Array
    token_offsets: Offsets | None = None
    tokens: Int32Array | None = None
    segments: Int32Array | None = None
    position_offsets: Offsets | None = None
    entry_offsets: Offsets | None = None
    ids: Int32Array | None = None
    logprobs: Float32Array | None = None
    tail_logmass: Float32Array | None = None
    label_logprobs: Float32Array | None = None
    entropies: Float32Array | None = None
    loss_mask: BoolArray | None = None
    positions: Int32Array | None = None
    teacher_nll: Float32Array | None = None
    teacher_entropy: Float32Array | None = None

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.sequences)

    @cached_property
    def entry_counts(self) -> Offsets:
        """[P]: how many entries each position has.

        ValueError if ids or logprobs were not read, or for offsets that leave them.
        """
        offsets = require("ids", self.entry_offsets)
        counts = np.diff(offsets)
        num_entries = min(len(require("ids", self.ids)), len(require("logprobs", self.logprobs)))
        if offsets[0] < 0 or offsets[-1] > num_entries or counts.min(initial=0) < 0:
            raise ValueError(f"offsets of entries do not ascend from 0 to at most {num_entries}")
        return counts

    @classmethod
    def from_rows(cls, rows: Sequence[Row]) -> RowGroup:
        """Concatenate at least one row. ValueError if a row's arrays do not fit together."""
        for row in rows:
            _check_shapes(row)
        counts = _all_or_none("counts", [row.counts for row in rows])
        lengths = np.array([len(row.tokens) for row in rows])
        sums: dict[str, Any] = {
            name: _all_or_none(name, [_array_of(getattr(row, name)) for row in rows])
            for name in ("teacher_nll", "teacher_entropy")
        }
        flat: dict[str, Any] = {
            name: _all_or_none(name, [getattr(row, name) for row in rows]) for name in _FLAT
        }
        return cls(
            sequences=np.array([row.sequence for row in rows], np.int64),
            token_offsets=_offsets(lengths),
            position_offsets=_offsets(lengths - 1),
            entry_offsets=None if counts is None else _offsets(counts),
            positions=(lengths - 1).astype(np.int32),
            **flat,
            **sums,
        )

    def row(self, r: int) -> Row:
        """Row r as views of this group. ValueError if a column it needs was not read."""
        if not 0 <= r < self.num_rows:
            raise IndexError(f"row {r} of a row group with {self.num_rows}")
        token_offsets = require("tokens", self.token_offsets)
        position_offsets = require("tokens", self.position_offsets)
        tokens = slice(token_offsets[r], token_offsets[r + 1])
        positions = slice(position_offsets[r], position_offsets[r + 1])
        counts = ids = logprobs = None
        if self.entry_offsets is not None:
            bounds = self.entry_offsets[positions.start : positions.stop + 1]
            entries = slice(bounds[0], bounds[-1])
            counts = np.diff(bounds).astype(np.int32)
            ids = require("ids", self.ids)[entries]
            logprobs = require("logprobs", self.logprobs)[entries]

        def part(values: npt.NDArray[_Scalar] | None) -> npt.NDArray[_Scalar] | None:
            return None if values is None else values[positions]

        def number(values: Float32Array | None) -> float | None:
            return None if values is None else float(values[r])

        return Row(
            sequence=int(self.sequences[r]),
            tokens=require("tokens", self.tokens)[tokens],
            segments=require("segments", self.segments)[tokens],
            counts=counts,
            ids=ids,
            logprobs=logprobs,
            tail_logmass=part(self.tail_logmass),
            label_logprobs=part(self.label_logprobs),
            entropies=part(self.entropies),
            loss_mask=part(self.loss_mask),
            teacher_nll=number(self.teacher_nll),
            teacher_entropy=number(self.teacher_entropy),
        )

    def totals(self) -> Totals:
        """Counts and float64 sums over a group whose columns were all read."""
        num_positions = int(require("tokens", self.position_offsets)[-1])
        mask = self.loss_mask
        return Totals(
            sequences=self.num_rows,
            tokens=num_positions if mask is None else int(mask.sum()),
            entries=0 if self.logprobs is None else len(self.logprobs),
            teacher_nll=_sum(self.teacher_nll),
            teacher_entropy=_sum(self.teacher_entropy),
            kept_mass=self._kept_mass(),
        )

    def _kept_mass(self) -> float | None:
        """The sum over positions of the probability that was kept; None without entries."""
        if self.logprobs is None:
            return None
        if self.tail_logmass is None:
            return float(np.exp(self.logprobs, dtype=np.float64).sum())
        mask = self.loss_mask
        tail = self.tail_logmass if mask is None else self.tail_logmass[mask]
        return float(-np.expm1(tail, dtype=np.float64).sum())


def require(column: str, values: _T | None) -> _T:
    """An optional column's values. ValueError naming the column if it was not read."""
    if values is None:
        raise ValueError(f"the column {column!r} of this row group was not read")
    return values


def _sum_of_both(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left + right


def _sum(values: Float32Array | None) -> float | None:
    return None if values is None else float(values.sum(dtype=np.float64))


def _array_of(value: float | None) -> Float32Array | None:
    return None if value is None else np.array([value], np.float32)


def _offsets(lengths: npt.NDArray[np.integer]) -> Int64Array:
    """[N] lengths -> [N + 1] offsets, int64."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _all_or_none(
    name: str, arrays: Sequence[npt.NDArray[_Scalar] | None]
) -> npt.NDArray[_Scalar] | None:
    """An optional column laid flat: all rows have it, or none."""
    present = [array for array in arrays if array is not None]
    if not present:
        return None
    if len(present) != len(arrays):
        raise ValueError(f"{name}: {len(present)} of {len(arrays)} rows have it; all or none must")
    flat: npt.NDArray[_Scalar] = np.concatenate(present)
    return flat


def _check_shapes(row: Row) -> None:
    num_tokens = len(row.tokens)
    if num_tokens < 2:
        raise ValueError(f"sequence {row.sequence}: {num_tokens} tokens; at least 2 are needed")
    num_entries = 0 if row.counts is None else int(row.counts.sum())
    expected: dict[str, tuple[int, type[np.generic]]] = {
        "tokens": (num_tokens, np.int32),
        "segments": (num_tokens, np.int32),
        "counts": (num_tokens - 1, np.int32),
        "ids": (num_entries, np.int32),
        "logprobs": (num_entries, np.float32),
        "tail_logmass": (num_tokens - 1, np.float32),
        "label_logprobs": (num_tokens - 1, np.float32),
        "entropies": (num_tokens - 1, np.float32),
        "loss_mask": (num_tokens - 1, np.bool_),
    }
    for name, (length, dtype) in expected.items():
        array = getattr(row, name)
        if array is not None and (array.shape != (length,) or array.dtype != dtype):
            raise ValueError(
                f"sequence {row.sequence}: {name} is {array.dtype} {array.shape},"
                f" expected {np.dtype(dtype)} ({length},)"
            )
    if row.counts is not None and (row.counts < 0).any():
        raise ValueError(f"sequence {row.sequence}: negative counts")
