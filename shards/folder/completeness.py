"""Which shards of a dataset are there, from names alone.

One listing of a split's folder answers for any number of shards (`listing.py`): a shard counts if
its sidecar is there. Only a split's last shard can be there and be too short, and only its sidecar
is read: extending a dataset removes a short shard that stops being the last (`continuing.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.files.durable import sync_folder
from shards.folder.listing import list_shards
from shards.folder.publication import adopt, check_not_alone
from shards.footer import Footer
from shards.layout import Layout
from shards.manifest import Manifest
from shards.row_group import Int64Array
from shards.sidecar import Sidecar, sidecar_path
from shards.writer import shard_name


@dataclass(frozen=True, kw_only=True, eq=False)
class SomeShards:
    """Some shards of a split that has `num_sequences`: the number and the sequences of each.

    Memory holds only `numbers` [S] int64; iteration makes one range after another.
    """

    numbers: Int64Array
    layout: Layout
    num_sequences: int

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[int, range]]:
        for shard in map(int, self.numbers):
            yield shard, self.sequences_of(shard)

    def sequences_of(self, shard: int) -> range:
        """The sequences of a shard."""
        return self.layout.shard_range(shard, self.num_sequences)

    def without(self, numbers: npt.ArrayLike) -> SomeShards:
        """All but those with these numbers."""
        return replace(self, numbers=np.setdiff1d(self.numbers, numbers))

    def owned_by(self, rank: int, world_size: int, first: int) -> SomeShards:
        """Those whose number, counted from `first`, is `rank` modulo `world_size`."""
        return replace(self, numbers=self.numbers[(self.numbers + first) % world_size == rank])

    def runs(self) -> Iterator[range]:
        """The sequences of all these shards, one range for shards that follow each other."""
        ends = np.flatnonzero(np.diff(self.numbers, append=-1) != 1)
        start = 0
        for end in map(int, ends):
            first, last = (
                self.layout.shard_range(int(self.numbers[i]), self.num_sequences)
                for i in (start, end)
            )
            yield range(first.start, last.stop)
            start = end + 1


def missing_shards(path: Path, manifest: Manifest, split: str) -> SomeShards:
    """The shards of a split that do not count yet, ascending.

    ShardCorruptError if the last shard's sidecar is damaged.
    """
    layout, num_sequences = manifest.spec.layout, manifest.splits[split].sequences
    num_shards = layout.num_shards(num_sequences)
    parquet, sidecars = list_shards(path / split, num_shards)
    counts = parquet & sidecars
    if counts[-1:].any():
        last = num_shards - 1
        sidecar = Sidecar.read(sidecar_path(path / split / shard_name(last)))
        counts[last] = sidecar.sequences == len(layout.shard_range(last, num_sequences))
    return SomeShards(numbers=np.flatnonzero(~counts), layout=layout, num_sequences=num_sequences)


def is_missing(path: Path, manifest: Manifest, split: str, shard: int, sequences: range) -> bool:
    """Whether a shard is to be written; one that only lacks a sidecar gets it here.

    ShardCorruptError for a Parquet file without a sidecar that is damaged, and for a shard of
    another number of sequences; ShardError for a sidecar without its Parquet file.
    """
    parquet = path / split / shard_name(shard)
    check_not_alone(parquet)
    if not parquet.exists():
        return True
    adopt(parquet, Footer(spec=manifest.spec, split=split, shard=shard), len(sequences))
    return False


def remove_shard(path: Path, split: str, shard: int) -> None:
    """Remove a short shard that is to be written again with more sequences.

    The sidecar goes first, so that an interruption leaves nothing that seems to be complete.
    """
    folder = path / split
    if not folder.is_dir():
        return
    parquet = folder / shard_name(shard)
    sidecar_path(parquet).unlink(missing_ok=True)
    sync_folder(folder)
    parquet.unlink(missing_ok=True)
    sync_folder(folder)
