"""Figures of a run as lines of JSON and for TensorBoard, cut back to where a run continues.

A killed run may have written lines for steps that it did not save and that are trained again; they
are removed before that, so that every step has exactly one line however often a run was
interrupted, and the lines are those of an uninterrupted run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.utils.tensorboard import SummaryWriter

from shards import durable


class Metrics:
    """Writes figures of steps from `step` on; a context manager that closes its files.

    `{"step": 3, "kind": "train", ...}`: kind is "train" or "validation".
    """

    def __init__(self, file: Path, tensorboard: Path, *, step: int) -> None:
        cut_back(file, step)
        self._file = file.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def write(self, step: int, kind: str, figures: Mapping[str, float]) -> None:
        """Add one line, which another process can read at once."""
        self._file.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Get everything to disk, before a checkpoint says that it happened."""
        os.fsync(self._file.fileno())
        self._tensorboard.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        self._tensorboard.close()


def cut_back(file: Path, step: int) -> None:
    """Keep the lines up to a step; what follows it, or is not a whole line, goes."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    durable.replace(file, "".join(kept))
