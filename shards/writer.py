"""Write rows to one shard: a Parquet file and its sidecar, both complete or absent.

The mirror of `reader.py`. The writer checks rows first, because a dataset outlives the run that
made it: shapes and order of the sequences (ValueError: a mistake in the calling code), and the
teacher's values (RunError naming the sequence).

It writes and flushes both files under temporary names before it publishes the first. So a shard is
without its sidecar for two system calls only (`folder/publication.py`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.arrow import to_table
from shards.checks import problem_with_values
from shards.errors import RunError
from shards.files.durable import discard, temporary_name
from shards.folder import publication
from shards.footer import Footer, parquet_writer
from shards.row_group import RowGroup, Totals
from shards.rows import Row
from shards.schema import ALL_COLUMNS, SEQUENCE, schema
from shards.sidecar import Sidecar, sidecar_path
from shards.spec import DatasetSpec


def shard_name(shard: int) -> str:
    """`shard-000003.parquet`; the name sorts like the number up to a million shards."""
    return f"shard-{shard:06}.parquet"


class ShardWriter:
    """Writes one shard of a split, a row group per call; a context manager that aborts.

    `directory` is the split's folder, made if missing. The shard holds the sequences from
    `shard * sequences_per_shard` on, as the layout of `spec` says.
    """

    def __init__(self, directory: Path, *, shard: int, split: str, spec: DatasetSpec) -> None:
        self.path = directory / shard_name(shard)
        self._footer = Footer(spec=spec, split=split, shard=shard)
        self._layout = spec.layout
        self._columns = schema(spec.columns)
        self._totals = Totals()
        self._temporary = temporary_name(self.path)
        self._temporary_sidecar = temporary_name(sidecar_path(self.path))
        self._file: IO[bytes] | None = None
        self._parquet: pq.ParquetWriter | None = None
        self._stopped = False
        with _run_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)

    def write_rows(self, rows: Sequence[Row]) -> None:
        """Append one row group: the next consecutive sequences, only the last group being short.

        ValueError for rows that do not fit together, RunError for values that no distribution has
        and for a disk that fails.
        """
        group = RowGroup.from_rows(rows)
        self._check_place(group)
        self._check_columns(group)
        problem = problem_with_values(group, self._footer.spec.tokenizer.vocab_size)
        if problem is not None:
            raise RunError(f"{self.path}: the teacher returned invalid values: {problem}")
        with _run_errors(self.path):
            if self._parquet is None:
                self._open()
            assert self._parquet is not None
            table = to_table(group, self._columns)
            self._parquet.write_table(table, row_group_size=group.num_rows)
        self._totals += group.totals()

    def publish(self, stop_after: str | None = None) -> Sidecar:
        """Flush the shard to disk and give it its name, then the sidecar.

        If another writer has already published the shard, this returns that writer's sidecar.
        `stop_after` names a step of `publication.STEPS`: publication.StoppedError is raised after
        it, and everything is left as a kill would leave it.
        """
        if self._parquet is None or self._file is None:
            raise ValueError("a shard without rows cannot be published")
        try:
            with _run_errors(self.path):
                self._parquet.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                publication.stop_if(stop_after, publication.PARQUET_FLUSHED)
                sidecar = publication.make_sidecar(self._temporary, self._footer, self._totals)
                sidecar.write(self._temporary_sidecar)
                publication.stop_if(stop_after, publication.SIDECAR_FLUSHED)
                sidecar = publication.publish(
                    self._temporary,
                    self._temporary_sidecar,
                    self.path,
                    self._footer,
                    self._totals.sequences,
                    stop_after,
                )
        except publication.StoppedError:
            self._stopped = True
            raise
        except BaseException:
            self.abort()
            raise
        self.abort()
        return sidecar

    def abort(self) -> None:
        """Remove what is not published; after `publish`, or a second time, do nothing."""
        if self._stopped:
            return
        # Closing writes buffered data, and may fail as the write before it did.
        with contextlib.suppress(OSError, ValueError, pa.ArrowException):
            if self._parquet is not None:
                self._parquet.close()
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._parquet = self._file = None
        discard(self._temporary, self._temporary_sidecar)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _open(self) -> None:
        self._file = self._temporary.open("xb")
        metadata = self._footer.to_metadata()
        self._parquet = parquet_writer(self._file, self._columns.names, metadata)

    def _check_columns(self, group: RowGroup) -> None:
        """ValueError unless the rows have the columns of the dataset, no less and no more."""
        names = [name for name in ALL_COLUMNS if getattr(group, _field(name)) is not None]
        if names != self._columns.names:
            raise ValueError(f"rows with columns {names}, expected {self._columns.names}")

    def _check_place(self, group: RowGroup) -> None:
        done, layout = self._totals.sequences, self._layout
        first = layout.first_sequence(self._footer.shard) + done
        if not np.array_equal(group.sequences, np.arange(first, first + group.num_rows)):
            raise ValueError(f"sequences {group.sequences} where {first} and following belong")
        if done % layout.sequences_per_row_group:
            raise ValueError("only the last row group of a shard may be short")
        if group.num_rows > layout.sequences_per_row_group:
            raise ValueError(
                f"{group.num_rows} rows in a row group of {layout.sequences_per_row_group}"
            )
        if done + group.num_rows > layout.sequences_per_shard:
            raise ValueError(f"more than {layout.sequences_per_shard} sequences in a shard")


@contextlib.contextmanager
def _run_errors(path: Path) -> Iterator[None]:
    """What the disk refuses, as one line for the user."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written: {error.strerror or error}; finished shards are kept; run"
            " the same command again to continue"
        ) from error


def _field(column: str) -> str:
    """The attribute of a `RowGroup` that holds a column."""
    return "sequences" if column == SEQUENCE else column
