"""Which shards of a dataset are there, from names alone.

One listing of a split's folder answers for any number of shards: a shard counts if its sidecar is
there. Only a split's last shard can be there and be too short, and only its sidecar is read:
extending a dataset removes a short shard that stops being the last (`continuing.py`).
"""

from __future__ import annotations

import os
from pathlib import Path

from shards.files.durable import sync_folder
from shards.footer import Footer
from shards.manifest import Manifest
from shards.publication import adopt, check_not_alone
from shards.sidecar import Sidecar, sidecar_path
from shards.writer import shard_name


def missing_shards(path: Path, manifest: Manifest, split: str) -> list[tuple[int, range]]:
    """The shards of a split that do not count yet, ascending: number and sequences of each.

    ShardCorruptError if the last shard's sidecar is damaged.
    """
    layout = manifest.spec.layout
    num_sequences = manifest.splits[split].sequences
    folder = path / split
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = []
    for shard in range(layout.num_shards(num_sequences)):
        sequences = layout.shard_range(shard, num_sequences)
        parquet = folder / shard_name(shard)
        there = {parquet.name, sidecar_path(parquet).name} <= names
        if there and sequences.stop == num_sequences:
            there = Sidecar.read(sidecar_path(parquet)).sequences == len(sequences)
        if not there:
            missing.append((shard, sequences))
    return missing


def shards_to_write(path: Path, manifest: Manifest, split: str) -> list[tuple[int, range]]:
    """The missing shards, after those that only lack a sidecar got one. Raises as `is_missing`."""
    return [
        (shard, sequences)
        for shard, sequences in missing_shards(path, manifest, split)
        if is_missing(path, manifest, split, shard, sequences)
    ]


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
