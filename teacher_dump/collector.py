"""Scored sequences in any order -> row groups in order -> shards, written in the background.

Rows wait here until their row group is whole; since the engine works nearly in order, few do. A
whole group goes to the writer thread through a bounded queue, so that a slow disk holds the engine
back instead of filling memory, and encoding overlaps with the engine. Whatever the thread raises
surfaces at the next `add` or at `close`, and nothing is written after it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import RunError
from shards.manifest import load_manifest
from shards.rows import Row
from shards.sidecar import Sidecar
from shards.spec import DatasetSpec
from shards.writer import ShardWriter, shard_name


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard to be written, and the sequences it holds."""

    split: str
    shard: int
    sequences: range


def refuse_outdated(out: Path, spec: DatasetSpec, plan: ShardPlan, hint: str = "") -> None:
    """RunError if another command has replaced or extended the dataset since this one began.

    What this run writes would be another dataset's, or too short in the middle of the split, and
    count as complete.
    """
    manifest = load_manifest(out)
    shard = out / plan.split / shard_name(plan.shard)
    if manifest.spec != spec:
        raise RunError(
            f"{shard}: is of a dataset that another command has replaced; {hint}run that command"
            " again"
        )
    now = spec.layout.shard_range(plan.shard, manifest.splits[plan.split].sequences)
    if now != plan.sequences:
        raise RunError(
            f"{shard}: holds {len(now)} sequences, not {len(plan.sequences)}, since another command"
            f" has extended the dataset; {hint}run that command again"
        )


@dataclass
class _Open:
    """A shard that has rows: those that wait, and the first sequence of its next row group."""

    plan: ShardPlan
    next_sequence: int
    waiting: dict[int, Row] = field(default_factory=dict)


class ShardCollector:
    """Takes the rows of whole shards in any order. A context manager that stops its thread.

    `num_sequences` is the size of each complete split. `on_shard` is called in the writer thread
    with every published sidecar, and `check` before and after a shard is published, with what an
    error has to advise first.
    """

    def __init__(
        self,
        out: Path,
        num_sequences: Mapping[str, int],
        *,
        spec: DatasetSpec,
        on_shard: Callable[[Sidecar], None],
        check: Callable[[ShardPlan, str], None] = lambda plan, hint: None,
    ) -> None:
        self._layout, self._num_sequences = spec.layout, num_sequences
        self._per_group = spec.layout.sequences_per_row_group
        self._writer = _BackgroundWriter(out, spec, on_shard, check)
        self._open: dict[tuple[str, int], _Open] = {}

    def add(self, split: str, row: Row) -> None:
        """Take one row; raises what the writer thread has failed with since the last call."""
        shard, _, _ = self._layout.locate(row.sequence)
        key = (split, shard)
        opened = self._open.get(key)
        if opened is None:
            sequences = self._layout.shard_range(shard, self._num_sequences[split])
            plan = ShardPlan(split=split, shard=shard, sequences=sequences)
            opened = _Open(plan, sequences.start)
            self._open[key] = opened
        opened.waiting[row.sequence] = row
        self._send_whole_groups(opened)
        if opened.next_sequence == opened.plan.sequences.stop:
            del self._open[key]

    def _send_whole_groups(self, opened: _Open) -> None:
        stop = opened.plan.sequences.stop
        while opened.next_sequence < stop:
            group = range(opened.next_sequence, min(opened.next_sequence + self._per_group, stop))
            if not all(number in opened.waiting for number in group):
                return
            rows = [opened.waiting.pop(number) for number in group]
            opened.next_sequence = group.stop
            self._writer.put(opened.plan, rows)

    def close(self) -> None:
        """Wait for everything to be on disk; raises what the writer thread failed with."""
        self._writer.close()

    def __enter__(self) -> ShardCollector:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._writer.stop()


class _BackgroundWriter:
    """One thread that owns the open shard writers and the disk."""

    def __init__(
        self,
        out: Path,
        spec: DatasetSpec,
        on_shard: Callable[[Sidecar], None],
        check: Callable[[ShardPlan, str], None],
    ) -> None:
        self._out, self._spec = out, spec
        self._on_shard, self._check = on_shard, check
        self._queue: queue.Queue[tuple[ShardPlan, list[Row]] | None] = queue.Queue(maxsize=2)
        self._writers: dict[tuple[str, int], ShardWriter] = {}
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)
        self._thread.start()

    def put(self, plan: ShardPlan, rows: list[Row]) -> None:
        self._raise_error()
        self._queue.put((plan, rows))

    def close(self) -> None:
        self.stop()
        self._raise_error()

    def stop(self) -> None:
        """End the thread after what is queued; what is not whole leaves nothing behind."""
        if not self._stopped:
            self._queue.put(None)
            self._stopped = True
        self._thread.join()  # again, if a signal has ended the wait

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:  # after a failure only drain, so that nobody waits for ever
                try:
                    self._write(*item)
                except BaseException as error:
                    self._error = error
        for writer in self._writers.values():
            writer.abort()

    def _write(self, plan: ShardPlan, rows: list[Row]) -> None:
        key = (plan.split, plan.shard)
        writer = self._writers.get(key)
        if writer is None:
            writer = ShardWriter(
                self._out / plan.split,
                shard=plan.shard,
                split=plan.split,
                spec=self._spec,
            )
            self._writers[key] = writer
        writer.write_rows(rows)
        if rows[-1].sequence == plan.sequences[-1]:
            self._check(plan, "")
            sidecar = writer.publish()
            self._check(plan, "delete it and its .json, and ")
            del self._writers[key]
            self._on_shard(sidecar)
