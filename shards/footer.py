"""A shard's metadata in its Parquet footer: dataset, split, number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from shards.errors import ShardCorruptError, ShardFormatError
from shards.files.typed_json import parse
from shards.schema import FORMAT_VERSION, METADATA_KEY, schema, writer_options
from shards.spec import SPLITS, DatasetSpec


@dataclass(frozen=True, kw_only=True)
class Footer:
    """The dataset that a shard belongs to, and its place there."""

    spec: DatasetSpec
    split: str
    shard: int

    def to_metadata(self) -> dict[bytes, str]:
        """The key-value metadata of a shard's Parquet footer."""
        content = {
            "format_version": FORMAT_VERSION,
            "shard": self.shard,
            "split": self.split,
            "spec": self.spec.to_json(),
        }
        return {METADATA_KEY: json.dumps(content, allow_nan=False)}

    @classmethod
    def read(cls, path: Path, parquet: pq.ParquetFile) -> Footer:
        """The footer of a shard file, checked against its columns.

        ShardFormatError for another file, version or columns, and for unknown keys and names.
        """
        stored = parquet.metadata.metadata or {}
        if METADATA_KEY not in stored:
            raise ShardFormatError(f"{path}: a Parquet file, but not a shard of logitshards")
        try:
            content = json.loads(stored[METADATA_KEY])
            version = content["format_version"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ShardCorruptError(
                f"{path}: damaged: its footer is not JSON: {error!r}"
            ) from error
        if version != FORMAT_VERSION:
            raise ShardFormatError(
                f"{path}: format version {version!r}, this release reads version {FORMAT_VERSION}"
            )
        try:
            fields = parse(_Content, content)
            if fields.split not in SPLITS:
                raise ValueError(
                    f"unknown split {fields.split!r}, this release knows {', '.join(SPLITS)}"
                )
        except ValueError as error:
            raise ShardFormatError(f"{path}: footer: {error}") from error
        spec = DatasetSpec.from_json(fields.spec, f"{path}: footer: spec")
        names = parquet.schema_arrow.names
        if not parquet.schema_arrow.equals(schema(spec.columns), check_metadata=False):
            raise ShardFormatError(
                f"{path}: has the columns {', '.join(names)}, but its footer describes"
                f" {', '.join(spec.columns)}"
            )
        return cls(spec=spec, split=fields.split, shard=fields.shard)


def parquet_writer(
    file: Any, columns: Sequence[str], metadata: Mapping[bytes, str | bytes]
) -> pq.ParquetWriter:
    """A writer for these columns and this footer: the same rows give the same bytes."""
    arrow_schema = schema(columns).with_metadata(metadata)
    return pq.ParquetWriter(file, arrow_schema, **writer_options(arrow_schema))


@dataclass(frozen=True, kw_only=True)
class _Content:
    format_version: int
    shard: int
    split: str
    spec: object
