"""Read one shard from a memory map, by row group; the mirror of `writer.py`.

Opening checks the footer's hash, the format version and the columns. Reading checks the CRC-32 of
every column chunk that is read, and that the columns fit together. Both check the size first,
because touching a mapped page beyond the end of a file kills the process. Only `verify_shard` reads
everything. So no single flipped byte reaches a caller as other numbers.

The map is clean page cache, not memory of the process. The checks cannot notice a file that another
process truncates while it is read or verified: the process then dies of SIGBUS.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.arrow import from_table
from shards.checks import problem_with_values
from shards.closing import Closing
from shards.errors import ShardCorruptError, ShardError, ShardFormatError, one_line
from shards.files.checksums import chunk_crc32, file_sha256, footer_sha256
from shards.footer import Footer
from shards.row_group import RowGroup, Totals
from shards.rows import Row
from shards.schema import ALL_COLUMNS
from shards.sidecar import Sidecar, sidecar_path
from shards.spec import DatasetSpec

__all__ = ["RowGroup", "ShardReader", "verify_shard"]


class ShardReader(Closing):
    """Reads one shard, which must have its sidecar; a context manager that closes it.

    ShardError without a sidecar, ShardCorruptError if the files are damaged or do not belong
    together, ShardFormatError for another format version. Not for use by several threads at once.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".parquet":
            raise ShardFormatError(f"{path}: not a shard; the name of a shard ends with .parquet")
        self.path = path
        self.sidecar = Sidecar.read(sidecar_path(path))
        self._map = self._open_map()
        buffer = self._map.read_buffer()
        self._content = memoryview(buffer)
        try:
            if footer_sha256(self._content) != self.sidecar.footer_sha256:
                raise self._corrupt("its footer does not match the sidecar")
            self._parquet = pq.ParquetFile(pa.BufferReader(buffer))
        except (ValueError, OSError, pa.ArrowException) as error:
            raise self._corrupt(one_line(error)) from error
        footer = Footer.read(path, self._parquet)
        if (footer.split, footer.shard) != (self.sidecar.split, self.sidecar.shard):
            raise self._corrupt("the sidecar belongs to another shard")
        self.spec: DatasetSpec = footer.spec
        self._columns: list[str] = self._parquet.schema_arrow.names
        rows = [self._parquet.metadata.row_group(i).num_rows for i in range(self.num_row_groups)]
        self._row_offsets = np.concatenate([[0], np.cumsum(rows)])
        if self.num_rows != self.sidecar.sequences:
            raise self._corrupt(
                f"it has {self.num_rows} rows, but the sidecar says {self.sidecar.sequences}"
            )

    @property
    def num_row_groups(self) -> int:
        """Row groups in this shard."""
        return int(self._parquet.metadata.num_row_groups)

    @property
    def num_rows(self) -> int:
        """Sequences in this shard."""
        return int(self._row_offsets[-1])

    def read_row_group(
        self, i: int, columns: Sequence[str] | None = None, *, use_threads: bool = True
    ) -> RowGroup:
        """Row group i with these columns, all if None; those that the shard lacks stay None.

        Nothing is read from disk for other columns. Arrow decodes columns side by side, or, without
        its threads, one after another. ShardCorruptError if a checksum differs.
        """
        if not 0 <= i < self.num_row_groups:
            raise IndexError(f"row group {i} of {self.num_row_groups} in {self.path}")
        unknown = set(columns or ()) - set(ALL_COLUMNS)
        if unknown:
            raise ValueError(f"no columns of a shard: {', '.join(sorted(unknown))}")
        self._check_size()
        wanted = self._columns if columns is None else [c for c in self._columns if c in columns]
        for name in wanted:
            column = self._columns.index(name)
            crc32 = chunk_crc32(self._content, self._parquet.metadata, i, column)
            if crc32 != self.sidecar.chunks_crc32[i][column]:
                raise self._corrupt(
                    f"the checksum of column {name} in row group {i} does not match"
                )
        first = self.sidecar.first_sequence
        sequences = np.arange(first + self._row_offsets[i], first + self._row_offsets[i + 1])
        try:
            table = self._parquet.read_row_group(i, columns=wanted, use_threads=use_threads)
            return from_table(table, sequences)
        except MemoryError as error:
            raise ShardError(
                f"{self.path}: not enough memory for row group {i}: {one_line(error)}"
            ) from error
        except (ValueError, OSError, pa.ArrowException) as error:
            raise self._corrupt(f"row group {i}: {one_line(error)}") from error

    def column_bytes(self) -> dict[str, int]:
        """The bytes that each column takes in the file."""
        metadata = self._parquet.metadata
        return {
            name: sum(
                metadata.row_group(i).column(j).total_compressed_size
                for i in range(self.num_row_groups)
            )
            for j, name in enumerate(self._columns)
        }

    def row(self, offset: int) -> Row:
        """The sequence at this offset in the shard; decodes the row group it is in."""
        if not 0 <= offset < self.num_rows:
            raise IndexError(f"row {offset} of {self.num_rows} in {self.path}")
        i = int(np.searchsorted(self._row_offsets, offset, side="right")) - 1
        return self.read_row_group(i).row(offset - int(self._row_offsets[i]))

    def verify(self) -> None:
        """Check the hash of the whole file, every value, and the sums in the sidecar."""
        self._check_size()
        if file_sha256(self._content) != self.sidecar.sha256:
            raise self._corrupt("the hash of the file does not match the sidecar")
        totals = Totals()
        for i in range(self.num_row_groups):
            group = self.read_row_group(i)
            problem = problem_with_values(group, self.spec.tokenizer.vocab_size)
            if problem is not None:
                raise self._corrupt(problem)
            totals += group.totals()
        expected = asdict(self.sidecar.totals)
        for name, value in asdict(totals).items():
            # Sums of exponentials may differ in the last bits from machine to machine.
            if not _is_close(value, expected[name]):
                raise self._corrupt(f"{name} is {value}, but the sidecar says {expected[name]}")

    def close(self) -> None:
        """Give the map back. Row groups that were read stay valid."""
        self._parquet.close(force=True)
        self._content.release()
        self._map.close()

    def _corrupt(self, text: str) -> ShardCorruptError:
        return ShardCorruptError(
            f"{self.path}: damaged: {text}; delete it together with its .json, and the same"
            " dump-logits command writes it again (if train-student saved it, put a copy back)"
        )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A missing file is damage; a file that the system does not hand out is not."""
        try:
            yield
        except FileNotFoundError as error:
            raise self._corrupt(str(error)) from error
        except OSError as error:
            raise ShardError(f"{self.path}: cannot be read: {error}") from error

    def _open_map(self) -> pa.MemoryMappedFile:
        self._check_size()
        with self._reading():
            file = pa.memory_map(str(self.path))
        if file.size() != self.sidecar.bytes:
            raise self._corrupt(
                f"it has {file.size()} bytes, but the sidecar says {self.sidecar.bytes}"
            )
        return file

    def _check_size(self) -> None:
        with self._reading():
            size = self.path.stat().st_size
        if size != self.sidecar.bytes:
            raise self._corrupt(f"it has {size} bytes, but the sidecar says {self.sidecar.bytes}")


def _is_close(value: float | None, expected: float | None) -> bool:
    if value is None or expected is None:
        return value is expected
    return math.isclose(value, expected, rel_tol=1e-9)


def verify_shard(path: Path) -> None:
    """Read and check everything in a shard. ShardCorruptError says what is wrong."""
    with ShardReader(path) as reader:
        reader.verify()
