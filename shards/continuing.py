"""Starting a dataset in a folder, or continuing the one that is there, or refusing.

The same command over and over leads to the same dataset: a folder is continued if and only if it
was made from the same identity. Sizes only grow. Any number of processes may start at once: the
first manifest is published without overwriting, and whoever loses that race continues.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from shards import durable
from shards.completeness import discard_shard
from shards.errors import IdentityMismatchError, InputError, RunError
from shards.identity import Json, differences
from shards.layout import Layout
from shards.manifest import MANIFEST_NAME, Manifest, SplitSize, load_manifest

# What the teacher pass may put into a folder before it can tell the identity.
_MADE_BEFORE = {"tokenizer", "tokens"}


def check_folder(path: Path) -> None:
    """InputError unless a dataset can be made in `path` or is there already."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: a file, where a folder for the dataset is expected")
    names = set(os.listdir(path)) if path.exists() else set()
    others = sorted(
        name
        for name in names - _MADE_BEFORE
        if not durable.is_temporary_name_of(name, MANIFEST_NAME)
    )
    if others and MANIFEST_NAME not in names:
        raise InputError(
            f"{path}: holds something else ({others[0]}), no dataset; give an empty or a new folder"
        )


def create_or_continue(
    path: Path,
    identity: Mapping[str, Json],
    splits: Mapping[str, SplitSize],
    recorded: Mapping[str, Json],
) -> Manifest:
    """Make the dataset's manifest, or take the one that is there, extended to larger sizes.

    InputError if the folder holds something else, IdentityMismatchError naming every difference if
    it holds a dataset that was made from something else, RunError if the disk fails.
    """
    check_folder(path)
    asked = Manifest(
        identity=json.loads(json.dumps(identity, allow_nan=False)),
        splits=splits,
        recorded=(json.loads(json.dumps(recorded, allow_nan=False)),),
    )
    manifest_path = path / MANIFEST_NAME
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not manifest_path.exists() and _create(manifest_path, asked):
            return asked
        present = load_manifest(path)
        check_identity(path, asked.identity, present.identity)
        merged = _merge(asked, present)
        if merged != present:
            _discard_outgrown(path, present, merged)
            durable.replace(manifest_path, merged.to_text())
    except OSError as error:
        raise RunError(f"{manifest_path}: cannot be written: {error.strerror}") from error
    return merged


def _create(path: Path, manifest: Manifest) -> bool:
    """Publish the first manifest; False if another process has just done so."""
    try:
        durable.write_new(path, manifest.to_text())
    except FileExistsError:
        return False
    return True


def check_identity(path: Path, asked: Mapping[str, Json], present: Mapping[str, Json]) -> None:
    """IdentityMismatchError naming every difference between this command and the folder `path`."""
    found = differences(asked, present)
    if found:
        raise IdentityMismatchError(
            f"{path}: holds a dataset that was made from something else: {'; '.join(found)}"
            " (here: this command, there: the folder); give another folder"
        )


def _merge(asked: Manifest, present: Manifest) -> Manifest:
    """The larger of both sizes for every split, and every different set-up once."""
    splits = dict(present.splits)
    for name, size in asked.splits.items():
        if name not in splits or size.sequences > splits[name].sequences:
            splits[name] = size
    new = tuple(one for one in asked.recorded if one not in present.recorded)
    return Manifest(identity=present.identity, splits=splits, recorded=(*present.recorded, *new))


def _discard_outgrown(path: Path, present: Manifest, merged: Manifest) -> None:
    """Remove last shards that were short and are to be full.

    Before the manifest is replaced, so that an interruption leaves a dataset with a shard missing
    and never a short shard in the middle of a split.
    """
    sequences_per_shard = Layout.of(present.identity).sequences_per_shard
    for name, size in present.splits.items():
        shard, rest = divmod(size.sequences, sequences_per_shard)
        if rest and merged.splits[name].sequences > size.sequences:
            discard_shard(path, name, shard)
