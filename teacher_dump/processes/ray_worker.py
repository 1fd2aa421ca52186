"""One engine in a Ray actor: it plans nothing, and writes the whole shards that the head names.

Failures travel as values. An exception would have to survive pickling, and Ray wraps it in a
traceback of many lines; what Ray itself raises then means that the process is gone.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from shards.errors import LogitshardsError, RunError
from teacher_dump.collector import ShardPlan
from teacher_dump.config import DumpConfig
from teacher_dump.coordinate import Planned, asked_spec, has_shards, planned_by_another
from teacher_dump.engines.interface import TeacherEngine
from teacher_dump.pass_progress import PassProgress
from teacher_dump.prepare import prepare
from teacher_dump.processes.devices import take_cores
from teacher_dump.shard_pass import DumpSummary, run_pass, start_and_probe

_REPORT_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A failure of a worker, as the line that the head ends with."""

    text: str
    exit_code: int


class Board:
    """What all workers have scored so far: an actor that they report to and the head reads."""

    def __init__(self) -> None:
        self._totals = [0, 0, 0]

    def add(self, sequences: int, positions: int, entries: int) -> None:
        """Count what a worker has scored since its last report."""
        for index, number in enumerate((sequences, positions, entries)):
            self._totals[index] += number

    def totals(self) -> list[int]:
        """Sequences, positions and entries of all workers."""
        return self._totals


class RayWorker:
    """The engine of one worker. `number` of `of` workers share the cores of a single machine."""

    def __init__(self, config: DumpConfig, board: Any, number: int, of: int | None) -> None:
        self._config = config
        self._board = board
        if of is not None:
            take_cores(number, of)
        self._planned: Planned | None = None
        self._engine: TeacherEngine | None = None
        self._tokenizer: Any = None

    def start(self) -> Failure | None:
        """Load the teacher."""
        try:
            self._start()
        except LogitshardsError as error:
            return Failure(text=_as_line(error), exit_code=error.exit_code)
        return None

    def write(self, plan: ShardPlan) -> DumpSummary | Failure:
        """Write one shard."""
        assert self._planned is not None  # the head calls start first
        progress = _Reported(self._board)
        try:
            return run_pass(
                self._config, self._tokenizer, [plan], self._planned, self._engine, progress
            )
        except LogitshardsError as error:
            return Failure(text=_as_line(error), exit_code=error.exit_code)

    def _start(self) -> None:
        config = self._config
        ready = prepare(config)
        self._tokenizer = ready.tokenizer
        self._planned = planned_by_another(config, ready, asked_spec(config, ready))
        if self._planned is None:
            raise RunError(
                f"{config.out}: a worker on {os.uname().nodename} does not see the dataset; all"
                " workers need the same file system"
            )
        if ready.teacher is None:
            return
        if has_shards(config.out):
            self._engine = ready.start_engine(config)
        else:
            self._engine, _ = start_and_probe(config, ready)


class _Reported(PassProgress):
    """Progress that goes to the board instead of the screen."""

    def __init__(self, board: Any) -> None:
        super().__init__()
        self._board = board
        self._reported = (0, 0, 0)
        self._reported_at = time.monotonic()

    def show_when_due(self) -> None:
        if time.monotonic() - self._reported_at > _REPORT_EVERY_S:
            self._report()

    def finish(self) -> None:
        self._report()

    def _report(self) -> None:
        now = (self.sequences, self.positions, self.entries)
        self._board.add.remote(*(a - b for a, b in zip(now, self._reported, strict=True)))
        self._reported, self._reported_at = now, time.monotonic()


def _as_line(error: LogitshardsError) -> str:
    from shards.options import OptionError

    return error.as_flag() if isinstance(error, OptionError) else str(error)
