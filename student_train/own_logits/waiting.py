"""Rows that are not in a published shard: in memory, and in every checkpoint.

A checkpoint holds all of them. Only when it has its name are the full shards among them published,
so no published row is beyond the newest checkpoint. A kill in between leaves shards unpublished
that the checkpoint holds; the run that continues publishes them first, or finds that they are
there. So every row is published exactly once.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards.arrow import from_table, to_table
from shards.errors import InputError
from shards.files.durable import check_links
from shards.folder.completeness import is_missing, missing_shards
from shards.folder.continuing import (
    check_folder,
    check_spec,
    create_or_continue,
    record_completeness,
    remove_old_temporaries,
)
from shards.folder.listing import has_shards
from shards.manifest import MANIFEST_NAME, Manifest, SplitSize, load_manifest
from shards.row_group import RowGroup
from shards.rows import Row
from shards.schema import schema
from shards.spec import TRAIN
from shards.tokenizer.files import TOKENIZER, write_tokenizer
from shards.writer import ShardWriter
from student_train.own_logits.plan import SavePlan

logger = logging.getLogger(__name__)

FILE_NAME = "rows.arrow"
_FIRST, _POSITIONS = b"first", b"positions"
_FULL_SHARDS = 2  # that wait before a checkpoint is due


class WaitingRows:
    """The rows after the last published shard, of the one process that writes them."""

    def __init__(self, plan: SavePlan) -> None:
        self._plan = plan
        self._layout = plan.spec.layout
        self._rows: list[Row] = []
        self._first = 0  # the number of the first of them
        self._positions = 0  # of all rows until now
        self._manifest: Manifest | None = None

    @property
    def full(self) -> bool:
        """Whether enough rows wait to make a checkpoint due."""
        return len(self._rows) >= _FULL_SHARDS * self._layout.sequences_per_shard

    def start(self, checkpoint: Path | None) -> None:
        """Make or continue the dataset, from a checkpoint if there is one.

        InputError or IdentityMismatchError for a folder that holds anything else, RunError if the
        disk fails.
        """
        path, spec = self._plan.path, self._plan.spec
        check_folder(path)
        if (path / MANIFEST_NAME).exists():
            check_spec(path, spec, load_manifest(path).spec)  # before anything in it changes
        check_links(path)
        if checkpoint is None and has_shards(path / TRAIN):
            raise InputError(
                f"--save-logits {path}: holds shards, but this run has no checkpoint; give an empty"
                " or a new folder"
            )
        source = self._plan.source
        hashes = source.manifest.tokenizer_files
        texts = {
            name: (source.path / TOKENIZER / name).read_text(encoding="utf-8") for name in hashes
        }
        write_tokenizer(path, texts)
        size = self._plan.num_sequences
        # The positions become exact at the end: a few sequences may be short.
        sizes = {TRAIN: SplitSize(sequences=size, positions=size * spec.sequence_length)}
        self._manifest = create_or_continue(path, spec, sizes, self._plan.record, hashes)
        remove_old_temporaries(path)
        if checkpoint is not None:
            self._read(checkpoint / FILE_NAME)
            self._check_published()
            self.publish()

    def add(self, rows: list[Row]) -> None:
        """Take the next rows. ValueError if others come first."""
        start = self._first + len(self._rows)
        if [row.sequence for row in rows] != list(range(start, start + len(rows))):
            raise ValueError(f"rows {[row.sequence for row in rows]} where {start} belongs")
        self._rows += rows
        self._positions += sum(len(row.tokens) - 1 for row in rows)

    def write(self, folder: Path) -> None:
        """Write all of them into the folder of a checkpoint. OSError if the disk fails."""
        metadata = {_FIRST: f"{self._first}", _POSITIONS: f"{self._positions}"}
        columns = schema(self._plan.spec.columns).with_metadata(metadata)
        per_group = self._layout.sequences_per_row_group
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with (
            pa.OSFile(str(folder / FILE_NAME), "wb") as file,
            pa.ipc.new_file(file, columns, options=options) as writer,
        ):
            for start in range(0, len(self._rows), per_group):
                group = RowGroup.from_rows(self._rows[start : start + per_group])
                writer.write_table(to_table(group, columns))

    def publish(self, *, last: bool = False) -> None:
        """Publish the full shards, with `last` the short one too, and forget their rows.

        RunError if the disk fails or for values that no distribution has.
        """
        per_shard = self._layout.sequences_per_shard
        while len(self._rows) >= per_shard or (last and self._rows):
            rows = self._rows[:per_shard]
            self._publish_shard(self._first // per_shard, rows)
            del self._rows[:per_shard]
            self._first += len(rows)

    def finish(self) -> None:
        """Publish what is left and record that the dataset is complete. RunError as `publish`."""
        assert self._manifest is not None
        self.publish(last=True)
        size = SplitSize(sequences=self._first, positions=self._positions)
        manifest = replace(self._manifest, splits={TRAIN: size})
        self._manifest = record_completeness(self._plan.path, manifest)
        logger.info(
            "%s: %d sequences of the student's own distributions", self._plan.path, self._first
        )

    def _publish_shard(self, shard: int, rows: list[Row]) -> None:
        path, spec = self._plan.path, self._plan.spec
        assert self._manifest is not None
        numbers = range(rows[0].sequence, rows[-1].sequence + 1)
        if not is_missing(path, self._manifest, TRAIN, shard, numbers):
            return
        per_group = self._layout.sequences_per_row_group
        with ShardWriter(path / TRAIN, shard=shard, split=TRAIN, spec=spec) as writer:
            for start in range(0, len(rows), per_group):
                writer.write_rows(rows[start : start + per_group])
            writer.publish()

    def _read(self, file: Path) -> None:
        """Take the rows of a checkpoint, whose hashes have been compared."""
        with pa.OSFile(str(file), "rb") as source, pa.ipc.open_file(source) as reader:
            metadata = reader.schema.metadata
            self._first, self._positions = int(metadata[_FIRST]), int(metadata[_POSITIONS])
            for number in range(reader.num_record_batches):
                table = pa.Table.from_batches([reader.get_batch(number)])
                start = self._first + len(self._rows)
                group = from_table(table, np.arange(start, start + table.num_rows))
                self._rows += [group.row(r) for r in range(group.num_rows)]

    def _check_published(self) -> None:
        """InputError unless the shards that the checkpoint takes for published are there."""
        assert self._manifest is not None
        path, published = self._plan.path, self._first // self._layout.sequences_per_shard
        missing = missing_shards(path, self._manifest, TRAIN).numbers
        lost = int((missing < published).sum())
        if lost:
            raise InputError(
                f"--save-logits {path}: {lost} of {published} shards that this run has published"
                " are missing; give the folder that the run began with"
            )
