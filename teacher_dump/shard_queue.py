"""Which shards a process writes, decided one at a time: its own first, then what is missing.

Rank r of W owns the shards whose number is r modulo W. When none of them is missing it helps with
those of other ranks, from the end, because their owners come from the front. So every process has
work until the dataset is complete, with any W, whichever ranks were killed. Two ranks may write the
same shard: publication makes that harmless, and a shard that somebody visibly writes is taken last.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shards.completeness import is_missing, missing_shards
from shards.files.durable import is_temporary
from shards.manifest import Manifest
from shards.writer import shard_name
from teacher_dump.collector import ShardPlan
from teacher_dump.ranks import Rank

# A writer adds a row group to its temporary file at least this often, unless it was killed.
_WRITTEN_WITHIN_S = 900.0


@dataclass(frozen=True)
class ShardQueue:
    """The shards that one rank writes; iterating takes one after the other, as they are needed."""

    out: Path
    manifest: Manifest
    rank: Rank

    @cached_property
    def own(self) -> list[ShardPlan]:
        """Before the first was taken: the missing shards that this rank owns, from the front."""
        return [plan for number, plan in self._missing() if self._owns(number)]

    def num_missing(self) -> int:
        """Missing shards of other ranks; a rank alone leaves none."""
        if self.rank.world_size == 1:
            return 0
        return sum(1 for _ in self._missing())

    def __iter__(self) -> Iterator[ShardPlan]:
        """Every shard is missing at the moment in which it is taken.

        ShardCorruptError for a Parquet file without a sidecar that is damaged, ShardError for a
        sidecar without its Parquet file.
        """
        taken: set[tuple[str, int]] = set()
        for plan in self.own:
            if self.is_missing(plan):
                taken.add((plan.split, plan.shard))
                yield plan
        while (other := self._other(taken)) is not None:
            taken.add((other.split, other.shard))
            if self.is_missing(other):
                yield other

    def _owns(self, number: int) -> bool:
        return number % self.rank.world_size == self.rank.rank

    def is_missing(self, plan: ShardPlan) -> bool:
        """Whether a shard is to be written; one that only lacks a sidecar gets it here."""
        return is_missing(self.out, self.manifest, plan.split, plan.shard, plan.sequences)

    def _missing(self) -> Iterator[tuple[int, ShardPlan]]:
        """Missing shards, numbered over all splits."""
        first = 0
        for split, size in self.manifest.splits.items():
            for shard, sequences in missing_shards(self.out, self.manifest, split):
                yield first + shard, ShardPlan(split=split, shard=shard, sequences=sequences)
            first += self.manifest.spec.layout.num_shards(size.sequences)

    def _other(self, taken: set[tuple[str, int]]) -> ShardPlan | None:
        """A missing shard to help with, None if there is none."""
        if self.rank.world_size == 1:
            return None
        missing = [plan for _, plan in self._missing() if (plan.split, plan.shard) not in taken]
        if not missing:
            return None
        written = _being_written(self.out, list(self.manifest.splits))
        free = [p for p in missing if (p.split, shard_name(p.shard)) not in written] or missing
        # From the end, and not all helpers the same one.
        return free[-1 - self.rank.rank % len(free)]


def _being_written(out: Path, splits: list[str]) -> set[tuple[str, str]]:
    """(split, name) of the shards of which a fresh temporary file is there."""
    now = time.time()
    found = set()
    for split in splits:
        with contextlib.suppress(FileNotFoundError), os.scandir(out / split) as entries:
            for entry in entries:
                if not is_temporary(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if now - entry.stat().st_mtime < _WRITTEN_WITHIN_S:
                        found.add((split, entry.name[1:].rsplit(".", 2)[0]))
    return found
