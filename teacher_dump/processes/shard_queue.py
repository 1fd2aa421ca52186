"""Which shards a process writes, decided one at a time: its own first, then what is missing.

Rank r of W owns the shards whose number is r modulo W. When none of them is missing it helps with
those of other ranks, from the end, because their owners come from the front. So every process has
work until the dataset is complete, with any W, whichever ranks were killed. Two ranks may write the
same shard: publication makes that harmless, and a rank takes a shard that another visibly writes
last.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shards.files.durable import is_temporary
from shards.folder.completeness import SomeShards, is_missing, missing_shards
from shards.manifest import Manifest
from teacher_dump.collector import ShardPlan, refuse_outdated
from teacher_dump.processes.ranks import Rank

# A writer adds a row group to its temporary file at least this often, unless it was killed.
_WRITTEN_WITHIN_S = 900.0
_TEMPORARY_SHARD = re.compile(r"\.shard-(\d+)\.parquet\.")


@dataclass(frozen=True)
class ShardQueue:
    """The shards that one rank writes; iterating takes one after the other, as they are needed."""

    out: Path
    manifest: Manifest
    rank: Rank

    @cached_property
    def own(self) -> Mapping[str, SomeShards]:
        """Before the first was taken: the missing shards that this rank owns, by split."""
        return {
            split: missing.owned_by(self.rank.rank, self.rank.world_size, first)
            for split, missing, first in self._missing()
        }

    def owns(self, plan: ShardPlan) -> bool:
        """Whether a shard is one of this rank's."""
        first = self._first_numbers[plan.split]
        return (first + plan.shard) % self.rank.world_size == self.rank.rank

    def num_missing(self) -> int:
        """Missing shards of other ranks; a rank alone leaves none."""
        if self.rank.world_size == 1:
            return 0
        return sum(len(missing) for _, missing, _ in self._missing())

    def is_missing(self, plan: ShardPlan) -> bool:
        """Whether a shard is to be written; one that only lacks a sidecar gets it here.

        RunError if another command has made it longer.
        """
        refuse_outdated(self.out, self.manifest.spec, plan)
        return is_missing(self.out, self.manifest, plan.split, plan.shard, plan.sequences)

    def __iter__(self) -> Iterator[ShardPlan]:
        """Every shard is missing at the moment in which it is taken.

        RunError if another command has extended the dataset, ShardCorruptError for a Parquet file
        without a sidecar that is damaged, ShardError for a sidecar without its Parquet file.
        """
        for split, shards in self.own.items():
            for shard, sequences in shards:
                plan = ShardPlan(split=split, shard=shard, sequences=sequences)
                if self.is_missing(plan):
                    yield plan
        taken: set[tuple[str, int]] = set()  # of other ranks; all its own a rank has taken by now
        while (other := self._other(taken)) is not None:
            taken.add((other.split, other.shard))
            if self.is_missing(other):
                yield other

    @cached_property
    def _first_numbers(self) -> Mapping[str, int]:
        """The number of each split's first shard, counted over all splits."""
        first, numbers = 0, {}
        for split, size in self.manifest.splits.items():
            numbers[split] = first
            first += self.manifest.spec.layout.num_shards(size.sequences)
        return numbers

    def _missing(self) -> Iterator[tuple[str, SomeShards, int]]:
        """Missing shards by split, and the number of the split's first shard."""
        for split, first in self._first_numbers.items():
            yield split, missing_shards(self.out, self.manifest, split), first

    def _other(self, taken: set[tuple[str, int]]) -> ShardPlan | None:
        """A missing shard to help with, None if there is none."""
        if self.rank.world_size == 1:
            return None
        written = _being_written(self.out, list(self.manifest.splits))
        missing = {
            split: shards.without(self.own[split].numbers).without(
                [shard for name, shard in taken if name == split]
            )
            for split, shards, _ in self._missing()
        }
        free = {
            split: shards.without([shard for name, shard in written if name == split])
            for split, shards in missing.items()
        }
        numbers = [
            (split, int(shard))
            for split, shards in (free if any(map(len, free.values())) else missing).items()
            for shard in shards.numbers[-self.rank.world_size :]
        ]
        if not numbers:
            return None
        # From the end, and not all helpers the same one.
        split, shard = numbers[-1 - self.rank.rank % len(numbers)]
        return ShardPlan(split=split, shard=shard, sequences=missing[split].sequences_of(shard))


def _being_written(out: Path, splits: list[str]) -> set[tuple[str, int]]:
    """(split, number) of the shards that have a fresh temporary file."""
    now = time.time()
    shards = set()
    for split in splits:
        with contextlib.suppress(FileNotFoundError), os.scandir(out / split) as entries:
            for entry in entries:
                shard = _TEMPORARY_SHARD.match(entry.name)
                if shard is None or not is_temporary(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if now - entry.stat().st_mtime < _WRITTEN_WITHIN_S:
                        shards.add((split, int(shard[1])))
    return shards
