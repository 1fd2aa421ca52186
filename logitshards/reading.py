"""A dataset for reading from Python: splits by name, their sequences by number.

Sequences are numbered from 0 in the order of the corpus. Reading one decodes the row group that it
is in (spec.layout.sequences_per_row_group sequences), and the last row group stays in memory:
neighbours are read at no cost, random access decodes a row group for each sequence.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

from logitshards.row import Row
from shards import dataset as stored
from shards.closing import Closing
from shards.manifest import SplitSize
from shards.row_group import RowGroup
from shards.spec import DatasetSpec


def open(path: str | os.PathLike[str]) -> Dataset:
    """Open the dataset in a folder. Its size does not matter: no shard is read.

    ShardError if there is no dataset, if it is of a newer format, incomplete or damaged; the
    message says which, and what to do.
    """
    return Dataset(stored.Dataset.open(Path(path)))


class Rows(Sequence[Row]):
    """Some sequences of a split, in some order: what a slice gives. Nothing is read in advance."""

    def __init__(self, split: Split, numbers: range) -> None:
        self._split = split
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, i: int) -> Row: ...

    @overload
    def __getitem__(self, i: slice) -> Rows: ...

    def __getitem__(self, i: int | slice) -> Row | Rows:
        if isinstance(i, slice):
            return Rows(self._split, self._numbers[i])
        number = operator.index(i)
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return self._split[self._numbers[number]]

    def __iter__(self) -> Iterator[Row]:
        for number in self._numbers:
            yield self._split[number]

    def __repr__(self) -> str:
        return f"<Rows: {len(self):,} sequences of {self._split!r}>"


class Split(Sequence[Row], Closing):
    """The sequences of one split; a context manager that closes.

    `split[i]` is a `Row`, also for a negative i; `split[a:b:c]` is a view that reads nothing yet.
    IndexError as for a list. Whatever reads raises ShardError for a shard that is missing or
    damaged. Not for use by several threads at once: open the dataset once in each.
    """

    def __init__(self, name: str, split: stored.Split) -> None:
        self.name = name
        self._split = split
        self._last: tuple[int, RowGroup] | None = None

    @property
    def spec(self) -> DatasetSpec:
        """What the dataset is."""
        return self._split.spec

    @property
    def num_positions(self) -> int:
        """Labelled positions of all sequences."""
        return self._split.num_positions

    def __len__(self) -> int:
        return self._split.num_sequences

    @overload
    def __getitem__(self, i: int) -> Row: ...

    @overload
    def __getitem__(self, i: slice) -> Rows: ...

    def __getitem__(self, i: int | slice) -> Row | Rows:
        if isinstance(i, slice):
            return Rows(self, range(len(self))[i])
        number = operator.index(i)
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)} in split {self.name}")
        shard, in_shard, offset = self._split.locate(number % len(self))
        group = self._row_group(shard * self.spec.layout.row_groups_per_shard + in_shard)
        return Row(group.row(offset), self.spec)

    def __iter__(self) -> Iterator[Row]:
        for number in range(len(self)):
            yield self[number]

    def __repr__(self) -> str:
        size = f"{len(self):,} sequences, {self.num_positions:,} labelled positions"
        return f"<Split {self.name!r}: {size}>"

    def close(self) -> None:
        """Close the files. Rows that were read stay valid; the next read opens the files again."""
        self._last = None
        self._split.close()

    def _row_group(self, g: int) -> RowGroup:
        """Row group g of the split, from memory if it was the last one read."""
        if self._last is None or self._last[0] != g:
            self._last = None  # let go of the old one first: one row group in memory, not two
            self._last = g, self._split.read_row_group(g)
        return self._last[1]


class Dataset(Mapping[str, Split], Closing):
    """A complete dataset: a mapping of the names of its splits to their sequences.

    `dataset["train"]` is the same `Split` each time; KeyError for an unknown name. A context
    manager that closes all splits.
    """

    def __init__(self, dataset: stored.Dataset) -> None:
        self._dataset = dataset
        self._open: dict[str, Split] = {}

    @property
    def path(self) -> Path:
        """The folder."""
        return self._dataset.path

    @property
    def spec(self) -> DatasetSpec:
        """What the dataset is: teacher, tokenizer, documents, keep method, layout."""
        return self._dataset.spec

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that have a sequence, "train" first."""
        return tuple(self._dataset.split_names)

    @property
    def sizes(self) -> dict[str, SplitSize]:
        """By split: `sequences`, and `positions`, all labelled positions of these."""
        return {name: self._dataset.manifest.splits[name] for name in self.splits}

    def __getitem__(self, name: str) -> Split:
        if name not in self.splits:
            raise KeyError(f"no split {name!r} in {self.path}; there is {', '.join(self.splits)}")
        if name not in self._open:
            self._open[name] = Split(name, self._dataset.split(name))
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.splits)

    def __len__(self) -> int:
        return len(self.splits)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {size.sequences:,}" for name, size in self.sizes.items())
        vocabulary = f"{self.spec.tokenizer.vocab_size:,} ids"
        return (
            f"<Dataset {str(self.path)!r}: {self.spec.keep.method}, {vocabulary},"
            f" sequences: {sizes}>"
        )

    def close(self) -> None:
        """Close the files of all splits. Rows that were read stay valid."""
        for split in self._open.values():
            split.close()
