"""Figures of a run as lines of JSON and for TensorBoard, cut back to where a run continues.

A killed run may have written lines for steps that it did not save. The run that continues trains
these steps again, and removes their lines first. So every step has exactly one line, and the lines
are those of an uninterrupted run. Times and memory would break that promise, so they have their own
file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self, TextIO

from torch.utils.tensorboard import SummaryWriter

from shards.files import durable
from shards.spec import VALIDATION
from student_train.figure_lines import read_lines
from student_train.run_folder import RunFolder


class Metrics:
    """Writes figures of steps after `step`; a context manager that closes its files.

    Lines of later steps are removed, and the validation line of `step` unless it is `evaluated`.
    `{"step": 3, "kind": "train", ...}`: kind is "train" or "validation" in metrics.jsonl, "speed"
    in speed.jsonl.
    """

    def __init__(self, folder: RunFolder | None, *, step: int, evaluated: bool = True) -> None:
        """Without a folder, of the processes that write none, everything is ignored."""
        self._files = ExitStack()
        self._file: TextIO | None = None
        if folder is None:
            return
        cut_back(folder.metrics, step, evaluated=evaluated)
        cut_back(folder.speed, step)
        with ExitStack() as files:
            self._file = files.enter_context(folder.metrics.open("a", encoding="utf-8"))
            self._speed_file = files.enter_context(folder.speed.open("a", encoding="utf-8"))
            self._tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=step + 1)
            files.callback(self._tensorboard.close)
            self._files = files.pop_all()

    def write(self, step: int, kind: str, figures: Mapping[str, float]) -> None:
        """Add one line of what a step or an evaluation computed."""
        if self._file is not None:
            self._write(self._file, step, kind, figures)

    def write_speed(self, step: int, figures: Mapping[str, float]) -> None:
        """Add one line of what no other run repeats: time and memory."""
        if self._file is not None:
            self._write(self._speed_file, step, "speed", figures)

    def flush(self) -> None:
        """Get everything to disk, before a checkpoint says that it happened."""
        if self._file is not None:
            for file in (self._file, self._speed_file):
                os.fsync(file.fileno())
            self._tensorboard.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _write(self, file: TextIO, step: int, kind: str, figures: Mapping[str, float]) -> None:
        """One line, which another process can read at once."""
        file.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
        file.flush()
        for name, value in figures.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, step)


def cut_back(file: Path, step: int, *, evaluated: bool = True) -> None:
    """Keep the lines up to a step; what follows it, or is not a whole line, goes.

    The validation line of the step goes too, unless it is `evaluated`. InputError for a line that
    cannot be read.
    """
    if not file.exists():
        return
    kept = []
    for text, figures in read_lines(file):
        is_evaluation = figures["step"] == step and figures["kind"] == VALIDATION
        if figures["step"] > step or (is_evaluation and not evaluated):
            break
        kept.append(text.decode())
    durable.replace(file, "".join(kept))
