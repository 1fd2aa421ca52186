"""The manifest of a dataset folder: what was asked for, everything needed to continue or refuse.

    DIR/manifest.json          this
    DIR/tokenizer/, tokens/    made by the teacher pass before the first shard
    DIR/<split>/shard-000000.parquet, shard-000000.json, ...

It says how large the dataset is to be, not how far it is: that is told from the shards themselves
(`completeness.py`), so that writing a shard never touches a file that others write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.errors import ShardCorruptError, ShardFormatError
from shards.sealed import seal, unseal

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class SplitSize:
    """The size that a split has when it is complete: sequences, and labelled positions of them."""

    sequences: int
    positions: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset was made from (compared), how large it is to be, what it was made with.

    `recorded` (engine, versions) has one entry for each different one that wrote to the dataset,
    oldest first; it is never compared.
    """

    identity: Mapping[str, Any]
    splits: Mapping[str, SplitSize]
    recorded: tuple[Mapping[str, Any], ...]

    def to_text(self) -> str:
        """The content of `manifest.json`."""
        return seal(
            {
                "identity": self.identity,
                "splits": {name: asdict(size) for name, size in self.splits.items()},
                "recorded": self.recorded,
            }
        )


def load_manifest(path: Path) -> Manifest:
    """Read the manifest of the dataset in the folder `path`.

    ShardFormatError if there is none or its version is unknown, ShardCorruptError if it is damaged.
    """
    file = path / MANIFEST_NAME
    try:
        content = unseal(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ShardFormatError(f"{path}: not a dataset: there is no {MANIFEST_NAME}") from error
    except OSError as error:
        raise ShardCorruptError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        return Manifest(
            identity=content["identity"],
            splits={name: SplitSize(**size) for name, size in content["splits"].items()},
            recorded=tuple(content["recorded"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ShardFormatError(f"{file}: not the manifest of a dataset: {error}") from error
