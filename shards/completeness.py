"""Which shards of a dataset are there, from names alone, and removing what does not count.

One listing of a split's folder answers for any number of shards: a Parquet file counts if its
sidecar is there. Only a split's last shard can be there and be too short, and only its sidecar is
read: extending a dataset discards a short shard that stops being the last (`continuing.py`).
"""

from __future__ import annotations

import os
from pathlib import Path

from shards.durable import is_temporary_name_of, sync_folder
from shards.layout import Layout
from shards.manifest import Manifest
from shards.sidecar import Sidecar, sidecar_path
from shards.writer import shard_name


def missing_shards(path: Path, manifest: Manifest, split: str) -> list[tuple[int, range]]:
    """The shards of a split still to be written, ascending: number and sequences of each.

    Whatever is there of them must be discarded first. ShardCorruptError if the last shard's
    sidecar is damaged.
    """
    layout = Layout.of(manifest.identity)
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


def discard_shard(path: Path, split: str, shard: int) -> None:
    """Remove a shard that does not count, or is to be extended, and temporary files of it.

    The sidecar goes first, so that an interruption leaves nothing that seems to be complete.
    """
    folder = path / split
    if not folder.is_dir():
        return
    parquet = folder / shard_name(shard)
    sidecar = sidecar_path(parquet)
    sidecar.unlink(missing_ok=True)
    sync_folder(folder)
    parquet.unlink(missing_ok=True)
    for name in os.listdir(folder):
        if is_temporary_name_of(name, parquet.name) or is_temporary_name_of(name, sidecar.name):
            (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
