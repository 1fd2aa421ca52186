"""The student's own distributions of every step: selected in its forward pass, row by row.

Letters: N positions of the lines of a micro batch, D hidden, V vocabulary.

The targets are those of the weights before the step's update. Every process selects for its own
lines, inside the forward pass of a sharded student; after the step the rows go to the first
process, in the order of the step's lines. What is selected does not depend on when a run was
interrupted, so nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shards.errors import RunError
from shards.rows import Int32Array, Row
from shards.spec import TRAIN
from student_train.data.batches import Batch
from student_train.objective.products import product
from student_train.own_logits.plan import SavePlan
from student_train.own_logits.waiting import WaitingRows
from student_train.processes.world import World
from teacher_dump.keep.compiling import uncompiled
from teacher_dump.keep.packed import unpack
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.random_keys import position_keys, sequence_key
from teacher_dump.keep.rows import TokenSequence, make_row
from teacher_dump.keep.selection import rows_at_once, selector_of


class OwnLogits:
    """Saves what a run asks for; every process of the run has one."""

    def __init__(self, plan: SavePlan, world: World) -> None:
        self._plan = plan
        self._world = world
        self._selector = selector_of(Selection(plan.spec.keep, plan.spec.tokenizer.vocab_size))
        self._waiting = WaitingRows(plan) if world.is_first else None
        self._step = 0
        self._selected: list[tuple[TokenSequence, Int32Array]] = []

    def start(self, checkpoint: Path | None) -> None:
        """`WaitingRows.start`, by the first process. Collective."""
        self._by_first(lambda waiting: waiting.start(checkpoint))

    def begin_step(self, step: int) -> None:
        """What is seen from now on is of this step; forget what is left of one that failed."""
        self._step = step
        self._selected = []

    def seen(self, hidden: Tensor, weight: Tensor, batch: Batch) -> None:
        """Select from hidden [B L, D] of a batch and the head's weight [V, D], as `batch_loss`."""
        if self._step < self._plan.first_step or not batch.lines:
            return
        spec, width = self._plan.spec, batch.labels.shape[1]
        sequences = [
            TokenSequence(
                split=TRAIN,
                number=self._plan.row_number(self._step, line.number),
                tokens=line.tokens,
                segments=line.segments,
                loss_mask=line.loss_mask,
            )
            for line in batch.lines
        ]
        lengths = [len(sequence.tokens) - 1 for sequence in sequences]
        places = [b * width + np.arange(length) for b, length in enumerate(lengths)]
        labels = [sequence.tokens[1:].astype(np.int64) for sequence in sequences]
        keys = [
            position_keys(sequence_key(spec.seed, TRAIN, sequence.number), 0, length)
            for sequence, length in zip(sequences, lengths, strict=True)
        ]
        columns = [np.concatenate(column) for column in (places, labels, keys)]
        packed = self._select(hidden, weight, [torch.from_numpy(column) for column in columns])
        parts = np.split(packed.numpy(), np.cumsum(lengths)[:-1])
        self._selected += zip(sequences, parts, strict=True)

    def end_step(self) -> None:
        """Bring the rows of a step that has been made to the first process. Collective.

        RunError for values that no distribution has.
        """
        if self._step < self._plan.first_step:
            return
        parts = self._world.to_first(self._world.together(self._rows))
        self._selected = []
        if self._waiting is not None:
            rows = [row for part in parts for row in part]
            self._waiting.add(sorted(rows, key=lambda row: row.sequence))

    @property
    def full(self) -> bool:
        """Whether a checkpoint is due, so that memory stays bounded; only the first knows."""
        return self._waiting is not None and self._waiting.full

    def write(self, folder: Path) -> None:
        """Write all rows that are not published into the folder of a checkpoint; the first does."""
        if self._waiting is not None:
            self._waiting.write(folder)

    def publish(self) -> None:
        """Publish full shards whose rows are in a checkpoint. Collective."""
        self._by_first(lambda waiting: waiting.publish())

    def finish(self) -> None:
        """Complete the dataset after the checkpoint of the last step. Collective."""
        self._by_first(lambda waiting: waiting.finish())

    def _rows(self) -> list[Row]:
        """The rows of this process; only now, because a run that diverges fails before."""
        selection = self._selector.selection
        try:
            return [
                make_row(sequence, unpack(packed, selection), selection.keep.logprob_step)
                for sequence, packed in self._selected
            ]
        except ValueError as error:
            raise RunError(
                f"--save-logits {self._plan.path}: step {self._step}: {error}"
            ) from error

    def _by_first(self, action: Callable[[WaitingRows], None]) -> None:
        """What the first process does with the rows; if it fails, all fail. Collective."""

        def act() -> None:
            if self._waiting is not None:
                action(self._waiting)

        self._world.together(act)

    @torch.no_grad()
    def _select(self, hidden: Tensor, weight: Tensor, columns: Sequence[Tensor]) -> Tensor:
        """Places among hidden [B L, D], labels, keys: int64 [N] -> packed [N, 4 + 2 K] int32.

        Products run as in the loss, one block of logits after the other; the result is on the CPU.
        """
        device, dtype = hidden.device, hidden.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        packed = []
        with torch.autocast(device.type, enabled=False), uncompiled():
            weight = weight.to(dtype)
            rows = rows_at_once(hidden.new_empty((0, len(weight))), self._selector.selection)
            blocks = (torch.split(column.to(device), rows) for column in columns)
            for places, labels, keys in zip(*blocks, strict=True):
                narrow = weight.new_empty((len(places), len(weight)))
                wide = (
                    narrow
                    if dtype == torch.float32
                    else torch.empty_like(narrow, dtype=torch.float32)
                )
                logits = product(hidden[places].to(dtype), weight.T, narrow, wide)
                packed.append(self._selector(logits, labels, keys).cpu())
        return torch.cat(packed)
