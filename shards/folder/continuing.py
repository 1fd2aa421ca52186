"""Start a dataset in a folder, continue the one in it, or reject the folder.

Repeating a command always leads to the same dataset: a run continues a folder if and only if the
specs are equal. Sizes only grow. Any number of processes may start at once: they publish the first
manifest without overwriting, and a process that loses this race continues with the other's.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shards.errors import IdentityMismatchError, InputError, RunError
from shards.files import durable
from shards.files.json_text import Json
from shards.folder.completeness import missing_shards, remove_shard
from shards.manifest import MANIFEST_NAME, Manifest, SplitSize, load_manifest
from shards.sidecar import Sidecar, sidecar_path
from shards.spec import SPLITS, DatasetSpec, differences
from shards.writer import shard_name

# What may be in a folder before it has a manifest; `lost+found` is in the root of a file system.
_MADE_BEFORE = {"tokenizer", "tokens", "lost+found", "preparing.json"}


def check_folder(path: Path) -> None:
    """InputError unless `path` holds a dataset, or one can be made in it."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: expected a folder for the dataset, found a file")
    names = set(os.listdir(path)) if path.exists() else set()
    others = sorted(name for name in names - _MADE_BEFORE if not durable.is_temporary(name))
    if others and MANIFEST_NAME not in names:
        raise InputError(
            f"{path}: contains {others[0]} but no dataset; give an empty or a new folder"
        )


def create_or_continue(
    path: Path,
    spec: DatasetSpec,
    splits: Mapping[str, SplitSize],
    recorded: Mapping[str, Json],
    tokenizer_files: Mapping[str, str],
    *,
    replacing: bool = False,
) -> Manifest:
    """Make the dataset's manifest, or take the one that is there, extended to larger sizes.

    `replacing`: replace an existing manifest, because its dataset has no shard yet.

    InputError if the folder holds other files, IdentityMismatchError naming every difference if it
    holds another dataset, RunError if the disk fails.
    """
    check_folder(path)
    asked = Manifest(
        spec=spec,
        splits=splits,
        recorded=(json.loads(json.dumps(recorded, allow_nan=False)),),
        tokenizer_files=tokenizer_files,
    )
    manifest_path = path / MANIFEST_NAME
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not manifest_path.exists() and _create(manifest_path, asked):
            return asked
        if replacing:
            durable.replace(manifest_path, asked.to_text())
            return asked
        present = load_manifest(path)
        check_spec(path, asked.spec, present.spec)
        merged = _merge(asked, present)
        if merged != present:
            _replace_with(path, present, merged)
    except OSError as error:
        raise RunError(f"{manifest_path}: cannot be written: {error.strerror}") from error
    return merged


def _replace_manifest(path: Path, manifest: Manifest, *, may_fail: bool) -> None:
    """`may_fail`: on a read-only disk the only loss is a record."""
    try:
        durable.replace(path, manifest.to_text())
    except OSError as error:
        if not may_fail or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise


def record_completeness(path: Path, manifest: Manifest) -> Manifest:
    """Record in the manifest whether every shard is there. RunError if the disk fails."""
    complete = not any(missing_shards(path, manifest, split) for split in manifest.splits)
    if complete == manifest.complete:
        return manifest
    manifest = replace(manifest, complete=complete)
    try:
        durable.replace(path / MANIFEST_NAME, manifest.to_text())
    except OSError as error:
        raise RunError(f"{path / MANIFEST_NAME}: cannot be written: {error.strerror}") from error
    return manifest


def remove_old_temporaries(path: Path) -> None:
    """Remove what killed runs left in a dataset's folders a day ago or earlier."""
    for folder in (path, *(path / split for split in SPLITS)):
        durable.remove_old_temporaries(folder)


def _create(path: Path, manifest: Manifest) -> bool:
    """Publish the first manifest; False if another process has just done so."""
    try:
        durable.write_new(path, manifest.to_text())
    except FileExistsError:
        return False
    return True


def check_spec(path: Path, asked: DatasetSpec, present: DatasetSpec) -> None:
    """IdentityMismatchError naming every difference between this command and the folder `path`."""
    mismatches = differences(asked, present)
    if mismatches:
        raise IdentityMismatchError(
            f"{path}: holds another dataset: {'; '.join(mismatches)}"
            " (here: this command, there: the folder); give another folder"
        )


def _merge(asked: Manifest, present: Manifest) -> Manifest:
    """The larger of both sizes for every split, and every different set-up once."""
    splits = dict(present.splits)
    for name, size in asked.splits.items():
        if name not in splits or size.sequences > splits[name].sequences:
            splits[name] = size
    new = [one for one in asked.recorded if not _is_known(one, present.recorded)]
    return replace(
        present,
        splits=splits,
        recorded=(*present.recorded, *new),
        complete=present.complete and splits == present.splits,
    )


def _is_known(record: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> bool:
    """Whether another record contains all of a record."""
    return any(
        all(key in old and old[key] == value for key, value in record.items()) for old in known
    )


def _replace_with(path: Path, present: Manifest, merged: Manifest) -> None:
    """Replace the manifest, and remove short last shards that become longer.

    They go first: an interruption then leaves a missing shard, and never a short shard in the
    middle of a split. A writer that had read the older manifest may publish one in between; it goes
    afterwards.
    """
    outgrown = []
    for name, size in present.splits.items():
        shard, rest = divmod(size.sequences, present.spec.layout.sequences_per_shard)
        if rest and merged.splits[name].sequences > size.sequences:
            outgrown.append((name, shard, rest))
    manifest = path / MANIFEST_NAME
    if outgrown and present.complete:
        durable.replace(manifest, replace(present, complete=False).to_text())
    for name, shard, _ in outgrown:
        remove_shard(path, name, shard)
    _replace_manifest(manifest, merged, may_fail=merged.splits == present.splits)
    for name, shard, rest in outgrown:
        sidecar = sidecar_path(path / name / shard_name(shard))
        if sidecar.exists() and Sidecar.read(sidecar).sequences == rest:
            remove_shard(path, name, shard)
