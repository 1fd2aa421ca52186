"""When to save a run: every few steps or by the clock, and when something ends it.

With `--save-logits` also when a few full shards wait, so that memory stays bounded. They are
published once the checkpoint that holds them has its name (`own_logits/waiting.py`).

A checkpoint decides where a run continues, never what it computes. By the clock, the time between
two checkpoints grows with the time of writing one, so that writing costs at most 2 %.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from shards.errors import ShardError
from student_train import checkpoint
from student_train.checkpoint import Progress
from student_train.metrics import Metrics
from student_train.own_logits.saving import OwnLogits
from student_train.processes.world import World, is_agreed
from student_train.run_folder import RunFolder

_SAVE_EVERY_S = 600.0
_OF_WRITING = 50
_READING_OR_MEMORY = (ShardError, torch.OutOfMemoryError)


class Saver:
    """Writes the checkpoints after that of `step`: one per `every` steps; None: by the clock."""

    def __init__(
        self,
        folder: RunFolder,
        metrics: Metrics,
        model: PreTrainedModel,
        optimizer: Optimizer,
        *,
        step: int,
        every: int | None,
        world: World,
        own_logits: OwnLogits | None = None,
    ) -> None:
        self._folder = folder.checkpoints
        self._metrics = metrics
        self._model = model
        self._optimizer = optimizer
        self._saved_step = step
        self._every = every
        self._world = world
        self._own_logits = own_logits
        self._due_at = time.monotonic() + _SAVE_EVERY_S

    def due(self, step: int) -> bool:
        """Whether a step that has just been made is to be saved. Collective."""
        due = time.monotonic() >= self._due_at if self._every is None else step % self._every == 0
        full = self._own_logits is not None and self._own_logits.full
        return bool(self._world.largest(self._world.is_first and (due or full)))

    def save(self, progress: Progress) -> None:
        """Write the checkpoint of a step, unless it is there. Collective.

        RunError if the disk fails.
        """
        if progress.step <= self._saved_step:
            return
        started = time.monotonic()
        self._metrics.flush()
        own = self._own_logits
        more = None if own is None else own.write
        checkpoint.save(self._folder, self._model, self._optimizer, progress, self._world, more)
        self._saved_step = progress.step
        if own is not None:
            own.publish()
        now = time.monotonic()
        self._due_at = now + max(_SAVE_EVERY_S, _OF_WRITING * (now - started))

    def record(self, progress: Progress) -> None:
        """Keep the evaluation of a step whose checkpoint is there, so that none is made again."""
        if progress.step == self._saved_step and self._world.is_first:
            self._metrics.flush()
            checkpoint.record(self._folder, progress)

    @contextmanager
    def kept(
        self,
        progress: Callable[[], Progress],
        failures: tuple[type[Exception], ...] = _READING_OR_MEMORY,
    ) -> Iterator[None]:
        """Save the steps that are done when a shard fails under the run, or memory runs out.

        With several processes all save if all fail together, whatever the reason is. Where memory
        runs out, the others are in the middle of a step, so none saves.
        Use it for code that has not changed the weights when it fails: a step computes gradients
        before it changes weights (`step.py`), and an evaluation never changes them.
        """
        try:
            yield
        except Exception as error:
            if is_agreed(error) or (self._world.size == 1 and isinstance(error, failures)):
                self.save(progress())
            raise
