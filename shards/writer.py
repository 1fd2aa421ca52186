"""Rows become one shard: a Parquet file and its sidecar, both there in full or not at all.

The mirror of `reader.py`. Rows are checked before they are written, because a dataset outlives the
run that made it: shapes and order of the sequences (a ValueError, a mistake in the calling code)
and the values that a teacher gave (a RunError naming the sequence).

The Parquet file and the sidecar are both written and flushed under temporary names before the
first of them is published, so the moment in which a shard has no sidecar yet is two system calls
long. Such a shard does not count: `dataset.discard_shard` removes it and it is written again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.arrow import to_table
from shards.checks import problem_with_values
from shards.checksums import chunks_crc32, file_sha256, footer_sha256
from shards.durable import publish, temporary_name
from shards.errors import RunError, ShardError
from shards.identity import Json
from shards.row_group import RowGroup, Totals
from shards.rows import Row
from shards.schema import FORMAT_VERSION, METADATA_KEY, has_entropy, schema, writer_options
from shards.sidecar import Sidecar, sidecar_path


def shard_name(shard: int) -> str:
    """`shard-000003.parquet`; the name sorts like the number up to a million shards."""
    return f"shard-{shard:06}.parquet"


class ShardWriter:
    """Writes one shard of a split, a row group per call; a context manager that aborts.

    `directory` is the split's folder, made if missing. The shard holds the sequences from
    `shard * sequences_per_shard` on, as `identity["layout"]` says.
    """

    def __init__(
        self,
        directory: Path,
        *,
        shard: int,
        split: str,
        identity: Mapping[str, Json],
        sequences_per_row_group: int,
    ) -> None:
        layout = identity["layout"]
        assert isinstance(layout, Mapping)
        if layout["sequences_per_row_group"] != sequences_per_row_group:
            raise ValueError(f"{sequences_per_row_group} rows per row group, but {layout}")
        self.path = directory / shard_name(shard)
        self._shard = shard
        self._split = split
        self._identity = identity
        self._vocab_size = _integer(identity["vocab_size"])
        self._sequences_per_shard = _integer(layout["sequences_per_shard"])
        self._sequences_per_row_group = sequences_per_row_group
        self._first_sequence = shard * self._sequences_per_shard
        self._totals = Totals()
        self._temporary = temporary_name(self.path)
        self._temporary_sidecar = temporary_name(sidecar_path(self.path))
        self._file: IO[bytes] | None = None
        self._parquet: pq.ParquetWriter | None = None
        with _run_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)

    def write_rows(self, rows: Sequence[Row]) -> None:
        """Append one row group: the next consecutive sequences, only the last group being short.

        ValueError for rows that do not fit together, RunError for values that no distribution has
        and for a disk that does not take them.
        """
        group = RowGroup.from_rows(rows)
        self._check_place(group)
        problem = problem_with_values(group, self._vocab_size)
        if problem is not None:
            raise RunError(f"{self.path}: the teacher gave what cannot be written: {problem}")
        if (group.teacher_entropy is not None) != has_entropy(self._identity):
            raise ValueError("teacher_entropy is in the rows or in the identity, but not in both")
        columns = schema(
            has_tail=group.tail_logmass is not None,
            has_mask=group.loss_mask is not None,
            has_entropy=group.teacher_entropy is not None,
        )
        with _run_errors(self.path):
            if self._parquet is None:
                self._open(columns)
            assert self._parquet is not None
            if not self._parquet.schema.equals(columns):
                raise ValueError("all rows of a shard have the same optional columns")
            self._parquet.write_table(to_table(group, columns), row_group_size=group.num_rows)
        self._totals += group.totals()

    def publish(self) -> Sidecar:
        """Flush the shard to disk and give it its name, then the sidecar.

        ShardError if there is a shard of this name already: nothing is overwritten.
        """
        if self._parquet is None or self._file is None:
            raise ValueError("a shard without rows cannot be published")
        try:
            with _run_errors(self.path):
                self._parquet.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                sidecar = self._make_sidecar()
                sidecar.write(self._temporary_sidecar)
                self._publish_both()
        finally:
            self.abort()
        return sidecar

    def abort(self) -> None:
        """Remove what is not published; after `publish`, or a second time, do nothing."""
        # Closing writes what is buffered, and may fail as the write before it did.
        with contextlib.suppress(OSError, ValueError, pa.ArrowException):
            if self._parquet is not None:
                self._parquet.close()
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._parquet = self._file = None
        self._temporary.unlink(missing_ok=True)
        self._temporary_sidecar.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abort()

    def _open(self, columns: pa.Schema) -> None:
        about = {
            "format_version": FORMAT_VERSION,
            "shard": self._shard,
            "split": self._split,
            "identity": self._identity,
        }
        columns = columns.with_metadata({METADATA_KEY: json.dumps(about, allow_nan=False)})
        self._file = self._temporary.open("xb")
        self._parquet = pq.ParquetWriter(self._file, columns, **writer_options(columns))

    def _check_place(self, group: RowGroup) -> None:
        done = self._totals.sequences
        first = self._first_sequence + done
        if not np.array_equal(group.sequences, np.arange(first, first + group.num_rows)):
            raise ValueError(f"sequences {group.sequences} where {first} and following belong")
        if done % self._sequences_per_row_group:
            raise ValueError("only the last row group of a shard may be short")
        if group.num_rows > self._sequences_per_row_group:
            raise ValueError(
                f"{group.num_rows} rows in a row group of {self._sequences_per_row_group}"
            )
        if done + group.num_rows > self._sequences_per_shard:
            raise ValueError(f"more than {self._sequences_per_shard} sequences in a shard")

    def _make_sidecar(self) -> Sidecar:
        """Checksums of what can be read back, not of what was meant to be written."""
        with pa.memory_map(str(self._temporary)) as file:
            buffer = file.read_buffer()
            content = memoryview(buffer)
            metadata = pq.read_metadata(pa.BufferReader(buffer))
            return Sidecar(
                shard=self._shard,
                split=self._split,
                first_sequence=self._first_sequence,
                sequences=self._totals.sequences,
                tokens=self._totals.tokens,
                entries=self._totals.entries,
                bytes=len(content),
                teacher_nll=self._totals.teacher_nll,
                teacher_entropy=self._totals.teacher_entropy,
                kept_mass=self._totals.kept_mass,
                footer_sha256=footer_sha256(content),
                sha256=file_sha256(content),
                chunks_crc32=chunks_crc32(content, metadata),
            )

    def _publish_both(self) -> None:
        sidecar = sidecar_path(self.path)
        # A sidecar without its shard would make ours count with the wrong checksums.
        if sidecar.exists():
            raise ShardError(f"{sidecar}: already there; nothing was overwritten")
        try:
            publish(self._temporary, self.path)
            publish(self._temporary_sidecar, sidecar)
        except FileExistsError as error:
            raise ShardError(
                f"{error.filename2}: already there; nothing was overwritten"
            ) from error


@contextlib.contextmanager
def _run_errors(path: Path) -> Iterator[None]:
    """What the disk refuses, as one line for the user."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written: {error.strerror or error}; finished shards are kept,"
            " and the same command continues after them"
        ) from error


def _integer(value: Json) -> int:
    assert isinstance(value, int)
    return value
