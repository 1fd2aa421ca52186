"""The manifest of a dataset folder: its spec, its size when complete, whether it is complete.

    DIR/manifest.json          this
    DIR/tokenizer/, tokens/    made before the first shard
    DIR/<split>/shard-000000.parquet, shard-000000.json, ...

The manifest does not say which shards exist: the shards themselves do (`folder/completeness.py`),
so that writing a shard never touches a file that other processes write. Once no shard is missing
the manifest says so, and opening the dataset then lists no folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.errors import ShardCorruptError, ShardFormatError
from shards.files.sealed import seal, unseal
from shards.files.typed_json import parse
from shards.spec import SPLITS, DatasetSpec

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class SplitSize:
    """The size of a complete split: sequences, and their labelled positions."""

    sequences: int
    positions: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset is (`spec`, which runs compare), its sizes, and what it was made with.

    `recorded` (engine, versions, corpus) has one entry for each different set-up that wrote to the
    dataset, oldest first; it is never compared. `tokenizer_files` are SHA-256 hashes of the files
    in `tokenizer/` by name. `complete`: every shard was there once.
    """

    spec: DatasetSpec
    splits: Mapping[str, SplitSize]
    recorded: tuple[Mapping[str, Any], ...]
    tokenizer_files: Mapping[str, str]
    complete: bool = False

    def to_text(self) -> str:
        """The content of `manifest.json`."""
        return seal(
            {
                "spec": self.spec.to_json(),
                "splits": {name: asdict(size) for name, size in self.splits.items()},
                "complete": self.complete,
                "tokenizer_files": self.tokenizer_files,
                "recorded": self.recorded,
            }
        )


@dataclass(frozen=True, kw_only=True)
class _Content:
    """The keys of `manifest.json`."""

    spec: object
    splits: Mapping[str, SplitSize]
    complete: bool
    tokenizer_files: Mapping[str, str]
    recorded: Sequence[Mapping[str, Any]]


def load_manifest(path: Path) -> Manifest:
    """Read the manifest of the dataset in the folder `path`.

    ShardFormatError if there is none, or for a version, key, keep method or split that is not
    known; ShardCorruptError if it is damaged.
    """
    file = path / MANIFEST_NAME
    try:
        content = unseal(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ShardFormatError(f"{path}: not a dataset: there is no {MANIFEST_NAME}") from error
    except OSError as error:
        raise ShardCorruptError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        fields = parse(_Content, content)
        for name in fields.splits:
            if name not in SPLITS:
                raise ValueError(f"unknown split {name!r}, this release knows {', '.join(SPLITS)}")
    except ValueError as error:
        raise ShardFormatError(f"{file}: {error}") from error
    return Manifest(
        spec=DatasetSpec.from_json(fields.spec, f"{file}: spec"),
        splits=fields.splits,
        recorded=tuple(fields.recorded),
        tokenizer_files=fields.tokenizer_files,
        complete=fields.complete,
    )
