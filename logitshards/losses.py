"""From rows to what `distillation_loss` takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitshards.row import Row
from shards.rows import Float32Array
from student_train.objective.distillation import Targets
from student_train.objective.kept_entries import KeptEntries, Run
from student_train.objective.loss import IGNORE_INDEX


def labels_and_targets(rows: Row | Sequence[Row]) -> tuple[Tensor, Targets]:
    """Labels [T] int64 and targets of the T positions of one row, or of several, one after another.

    A label is -100, to be ignored, where `loss_mask` is false. Position t belongs to the hidden
    state that the student has after `tokens[0 .. t]` of its row: give the student `tokens[:-1]`.

    All rows are of one dataset. ValueError for no rows, ShardError for a dataset of tokens alone.
    """
    rows = [rows] if isinstance(rows, Row) else list(rows)
    if not rows:
        raise ValueError("no rows: nothing to make labels of")
    runs: list[Run] = []
    start = 0
    for row in rows:
        runs.append(Run(start, row.ids.counts, row.ids.flat, row.logprobs.flat))
        start += len(row)
    labels = np.concatenate([_labels(row) for row in rows])
    return torch.from_numpy(labels), Targets(
        KeptEntries.gather(runs, start),
        _joined([row.tail_logmass for row in rows]),
        _joined([row.entropies for row in rows]),
    )


def _labels(row: Row) -> npt.NDArray[np.int64]:
    labels = row.tokens[1:].astype(np.int64)
    if row.loss_mask is not None:
        labels[~row.loss_mask] = IGNORE_INDEX
    return labels


def _joined(columns: Sequence[Float32Array | None]) -> Tensor | None:
    """A column of all rows end to end; None if the dataset does not have it."""
    present = [column for column in columns if column is not None]
    return torch.from_numpy(np.concatenate(present)) if present else None
