"""A shard gets its two names: first the Parquet file, then the sidecar that makes it count.

Any number of writers may make the same shard, on any number of machines, and any of them may be
killed at any moment. These rules make that safe:

- No process removes or replaces a published name. The first Parquet file is the shard.
- A published sidecar is always made from the published Parquet file. A writer that finds a Parquet
  file without a sidecar reads it in full and makes the sidecar from it. No hash protects that file
  yet, and Parquet's own checksums leave out the footer and the page headers. But writers are
  deterministic: encoding the rows again must give the same bytes.
- A writer that finds the shard published has succeeded.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.arrow import from_table, to_table
from shards.checks import problem_with_values
from shards.errors import RunError, ShardCorruptError, ShardError, one_line
from shards.files import durable
from shards.files.checksums import chunks_crc32, file_sha256, footer_sha256
from shards.footer import Footer, parquet_writer
from shards.row_group import Totals
from shards.schema import METADATA_KEY
from shards.sidecar import Sidecar, sidecar_path
from shards.spec import differences

# The steps of publishing, in order; `stop_after` simulates a kill after one of them.
PARQUET_FLUSHED = "parquet flushed"
SIDECAR_FLUSHED = "sidecar flushed"
PARQUET_NAMED = "parquet named"
SIDECAR_NAMED = "sidecar named"
STEPS = (PARQUET_FLUSHED, SIDECAR_FLUSHED, PARQUET_NAMED, SIDECAR_NAMED)


class StoppedError(Exception):
    """Publishing ended after the step that `stop_after` named, leaving what a kill would leave."""


def stop_if(stop_after: str | None, step: str) -> None:
    """StoppedError if this is the step to stop after."""
    if stop_after == step:
        raise StoppedError(step)


def make_sidecar(path: Path, footer: Footer, totals: Totals) -> Sidecar:
    """The sidecar of a Parquet file that is there: checksums of what can be read back."""
    with pa.memory_map(str(path)) as file:
        buffer = file.read_buffer()
        content = memoryview(buffer)
        metadata = pq.read_metadata(pa.BufferReader(buffer))
        return Sidecar(
            shard=footer.shard,
            split=footer.split,
            first_sequence=footer.spec.layout.first_sequence(footer.shard),
            sequences=totals.sequences,
            tokens=totals.tokens,
            entries=totals.entries,
            bytes=len(content),
            teacher_nll=totals.teacher_nll,
            teacher_entropy=totals.teacher_entropy,
            kept_mass=totals.kept_mass,
            footer_sha256=footer_sha256(content),
            sha256=file_sha256(content),
            chunks_crc32=chunks_crc32(content, metadata),
        )


def publish(
    temporary: Path,
    temporary_sidecar: Path,
    path: Path,
    footer: Footer,
    sequences: int,
    stop_after: str | None,
) -> Sidecar:
    """Name both files, or take the shard of this name that another writer has published.

    ShardError for a sidecar whose Parquet file is gone: its checksums are of another file.
    """
    check_not_alone(path)
    try:
        durable.publish(temporary, path)
    except FileExistsError:
        return adopt(path, footer, sequences)
    stop_if(stop_after, PARQUET_NAMED)
    sidecar = sidecar_path(path)
    # Unless another process has found the Parquet file and made its sidecar.
    with contextlib.suppress(FileExistsError):
        durable.publish(temporary_sidecar, sidecar)
    stop_if(stop_after, SIDECAR_NAMED)
    return Sidecar.read(sidecar)


def check_not_alone(path: Path) -> None:
    """ShardError if only the sidecar of a shard exists."""
    # In this order: the Parquet file is named first.
    if sidecar_path(path).exists() and not path.exists():
        raise ShardError(
            f"{sidecar_path(path)}: describes a shard that is missing; delete this file, and the"
            " same command writes the shard again"
        )


def adopt(path: Path, footer: Footer, sequences: int) -> Sidecar:
    """The sidecar of a published Parquet file; makes a missing one from the file.

    ShardCorruptError for a file that is damaged or another shard than `footer` says, or that holds
    another number of sequences.
    """
    file = sidecar_path(path)
    if not file.exists():
        try:
            _make_missing_sidecar(path, footer, sequences)
        except ShardCorruptError:
            # The bytes of another release of Arrow may differ; by now its own writer is done.
            if not file.exists():
                raise
    sidecar = Sidecar.read(file)
    if sidecar.sequences != sequences:
        raise ShardCorruptError(
            f"{path}: holds {sidecar.sequences} sequences, expected {sequences}; delete it and its"
            " .json, and the same command writes it again"
        )
    return sidecar


def _make_missing_sidecar(path: Path, footer: Footer, sequences: int) -> None:
    file = sidecar_path(path)
    sidecar = make_sidecar(path, footer, _checked_totals(path, footer, sequences))
    temporary = durable.temporary_name(file)
    try:
        sidecar.write(temporary)
        durable.publish(temporary, file)
    except FileExistsError:
        pass  # another process has found the Parquet file too
    except OSError as error:
        raise RunError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        durable.discard(temporary)


def _checked_totals(path: Path, footer: Footer, sequences: int) -> Totals:
    """Check everything in a Parquet file; returns its counts and sums."""
    try:
        with pa.memory_map(str(path)) as file:
            totals = _totals(path, file.read_buffer(), footer)
        if totals.sequences != sequences:
            raise ValueError(f"it holds {totals.sequences} sequences, expected {sequences}")
    except (ValueError, OSError, pa.ArrowException, ShardError) as error:
        # Arrow raises OSError without a number for files that are damaged.
        if isinstance(error, OSError) and error.errno is not None:
            raise ShardError(f"{path}: cannot be read: {error}") from error
        raise ShardCorruptError(
            f"{path}: has no sidecar, and none can be made from it: {one_line(error)}; delete it,"
            " and the same command writes it again"
        ) from error
    return totals


def _totals(path: Path, buffer: pa.Buffer, footer: Footer) -> Totals:
    totals = Totals()
    content = memoryview(buffer)
    footer_sha256(content)  # ValueError for what is no Parquet file at all
    with pq.ParquetFile(pa.BufferReader(buffer), page_checksum_verification=True) as parquet:
        own_footer = Footer.read(path, parquet)
        wrong = differences(footer.spec, own_footer.spec)
        if wrong or (own_footer.split, own_footer.shard) != (footer.split, footer.shard):
            shard = f"shard {own_footer.shard} of split {own_footer.split}"
            raise ValueError("; ".join([f"it is another shard: {shard}", *wrong]))
        first = footer.spec.layout.first_sequence(footer.shard)
        again = _SameBytes(content)
        metadata = {METADATA_KEY: parquet.metadata.metadata[METADATA_KEY]}
        with parquet_writer(again, footer.spec.columns, metadata) as writer:
            for i in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(i).num_rows
                start = first + totals.sequences
                group = from_table(parquet.read_row_group(i), np.arange(start, start + rows))
                problem = problem_with_values(group, footer.spec.tokenizer.vocab_size)
                if problem is not None:
                    raise ValueError(problem)
                table = to_table(group, writer.schema)
                writer.write_table(table, row_group_size=group.num_rows)
                totals += group.totals()
        if not again.is_whole:
            raise ValueError("it is damaged: encoding its rows again gives other bytes")
    return totals


class _SameBytes(io.RawIOBase):
    """A file that keeps nothing, and only compares what is written with this content."""

    def __init__(self, content: memoryview) -> None:
        self._content = content.cast("B")
        self._position = 0
        self._same = True

    @property
    def is_whole(self) -> bool:
        """Whether the whole content was written, and nothing else."""
        return self._same and self._position == len(self._content)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = len(data)
        end = self._position + size
        self._same = self._same and self._content[self._position : end] == data
        self._position = end
        return size
