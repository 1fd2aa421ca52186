"""Where a sequence is, by arithmetic on its number, so that finding it needs no table.

Shard i of a split always holds the same sequences, at any time and by any writer. Every shard but
the last of a split is full; the last row group of any shard, and the last shard, may be short.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many sequences a shard and a row group hold."""

    sequences_per_shard: int
    sequences_per_row_group: int

    def __post_init__(self) -> None:
        if min(self.sequences_per_shard, self.sequences_per_row_group) < 1:
            raise ValueError(f"{self}: both numbers must be at least 1")

    @property
    def row_groups_per_shard(self) -> int:
        """Row groups of a full shard."""
        return -(-self.sequences_per_shard // self.sequences_per_row_group)

    def first_sequence(self, shard: int) -> int:
        """The number of the first sequence of a shard."""
        return shard * self.sequences_per_shard

    def num_shards(self, num_sequences: int) -> int:
        """Shards of a split with this many sequences."""
        return -(-num_sequences // self.sequences_per_shard)

    def num_row_groups(self, num_sequences: int) -> int:
        """Row groups of a split with this many sequences."""
        full_shards, rest = divmod(num_sequences, self.sequences_per_shard)
        return full_shards * self.row_groups_per_shard - (-rest // self.sequences_per_row_group)

    def shard_range(self, shard: int, num_sequences: int) -> range:
        """The sequences of one shard of a split with this many."""
        start = shard * self.sequences_per_shard
        return range(start, min(start + self.sequences_per_shard, num_sequences))

    def row_group_range(self, row_group: int, num_sequences: int) -> range:
        """The sequences of one row group, numbered over the whole split."""
        shard, in_shard = divmod(row_group, self.row_groups_per_shard)
        sequences = self.shard_range(shard, num_sequences)
        start = in_shard * self.sequences_per_row_group
        return sequences[start : start + self.sequences_per_row_group]

    def locate(self, sequence: int) -> tuple[int, int, int]:
        """(shard, row group in the shard, offset in the row group) of a sequence."""
        shard, in_shard = divmod(sequence, self.sequences_per_shard)
        return shard, *divmod(in_shard, self.sequences_per_row_group)
