"""The steps of a training run, from wherever it was killed.

A step is a function of the weights, AdamW's moments and its number: data order, learning rate and
random numbers (dropout, in a student that has some) are computed from the number. So a run that
continues from a checkpoint repeats the uninterrupted one, bit for bit in float32 on a CPU with the
same number of threads, and its metrics are the same lines.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from shards.dataset import Dataset, Split
from shards.errors import RunError, StoppedError
from shards.files.json_text import Json
from shards.spec import TRAIN, VALIDATION
from student_train import checkpoint
from student_train.checkpoint import Progress
from student_train.config import TrainConfig
from student_train.data.batches import Batch, for_device, step_batches
from student_train.data.mixture import order_seed
from student_train.data.order import START
from student_train.data.read_ahead import ReadAhead
from student_train.data.stream import Stream, shares_of
from student_train.evaluation.evaluate import evaluate
from student_train.evaluation.token_bytes import token_bytes
from student_train.flops import peak_tokens_per_s
from student_train.live_teacher import LiveTeacher
from student_train.metrics import Metrics
from student_train.overview import log_start, summarise
from student_train.own_logits.saving import OwnLogits
from student_train.processes.sharding import Sharded, model_of
from student_train.processes.world import World
from student_train.run_folder import RunFolder
from student_train.run_progress import TrainProgress
from student_train.saving import Saver
from student_train.setup import columns_to_read, make_objective, plan_schedules
from student_train.speed import LIMITS, StepClock
from student_train.step import (
    StepResult,
    autocast_for,
    batch_loss,
    make_optimizer,
    optimizer_step,
)
from student_train.stop import StopRequest

_READ_AHEAD_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class _Process:
    """What belongs to the process that runs the steps now; the next process makes it anew."""

    metrics: Metrics
    stop: StopRequest
    saver: Saver
    clock: StepClock
    display: TrainProgress


class Training:
    """A model on its way: what all steps share, and how far they are."""

    def __init__(
        self,
        config: TrainConfig,
        splits: Sequence[Split],
        evaluation_dataset: Dataset | None,
        student: PreTrainedModel | Sharded,
        folder: RunFolder,
        world: World,
        teacher: LiveTeacher | None = None,
        own_logits: OwnLogits | None = None,
    ) -> None:
        self._config = config
        self._splits = splits
        self._shares = shares_of(config.weights, splits)
        self._length = splits[0].spec.sequence_length
        self._evaluation_dataset = evaluation_dataset
        self._folder = folder
        self._world = world
        self._own_logits = own_logits
        loss_of = partial(partial, batch_loss) if teacher is None else teacher.loss_of
        self._loss_of = loss_of if own_logits is None else partial(loss_of, seen=own_logits.seen)
        self._autocast = autocast_for(
            config.dtype, world.device, sharded=isinstance(student, Sharded)
        )
        self._objective = make_objective(config, splits[0])
        self._student = student.train()
        self._model = model_of(student)
        self._optimizer = make_optimizer(student, config)
        self._progress = self._load() or Progress(
            step=0, tokens=0, sequences=[0] * len(splits), positions=[START] * len(splits)
        )
        self._bytes_of_tokens = (
            None
            if evaluation_dataset is None
            else world.from_first(token_bytes(evaluation_dataset))
        )

    def _load(self) -> Progress | None:
        """Continue from the newest checkpoint, if there is one. Collective."""
        world, folder = self._world, self._folder.checkpoints
        newest = world.together(lambda: checkpoint.find_newest(folder) if world.is_first else None)
        newest = world.from_first(newest)
        progress = None
        if newest is not None:
            progress = checkpoint.load(newest, self._model, self._optimizer, world)
        if self._own_logits is not None:
            self._own_logits.start(newest)
        return progress

    def train(self, step_sequences: int, num_steps: int) -> None:
        """All steps that are left, with their evaluations and checkpoints."""
        config, done = self._config, self._progress.step
        log_start(config, self._model, self._splits, self._progress, step_sequences, num_steps)
        rates, alphas = plan_schedules(config, num_steps)
        peak = peak_tokens_per_s(self._model, self._length, config.dtype, self._world.device)
        peak = None if peak is None else peak * self._world.size
        with (
            Metrics(
                self._folder if self._world.is_first else None,
                step=done,
                evaluated=not self._progress.evaluation_due,
            ) as metrics,
            ReadAhead(self._batches(step_sequences), _READ_AHEAD_BATCHES) as ahead,
            StopRequest() as stop,
        ):
            process = _Process(
                metrics=metrics,
                stop=stop,
                saver=Saver(
                    self._folder,
                    metrics,
                    self._model,
                    self._optimizer,
                    step=done,
                    every=config.save_every,
                    world=self._world,
                    own_logits=self._own_logits,
                ),
                clock=StepClock(self._world.device, peak),
                display=TrainProgress(done, num_steps, peak),
            )
            self._after_step(process, save=False)
            for step in range(done + 1, num_steps + 1):
                self._train_step(process, step, alphas.at(step - 1), rates.at(step - 1), ahead)
                last = step == num_steps
                due = config.eval_every is not None and step % config.eval_every == 0
                self._progress = replace(self._progress, evaluation_due=last or due)
                self._after_step(process, save=last or process.saver.due(step))
            self._end_if_asked(process)
        process.display.clear()

    def _after_step(self, process: _Process, *, save: bool) -> None:
        """Save a step if that is due, evaluate it, and save it if the evaluation fails."""
        paused = time.monotonic()
        if save:
            process.saver.save(self._progress)
        with process.saver.kept(lambda: self._progress, (Exception,)):
            self._evaluate_if_due(process)
        self._end_if_asked(process)
        process.display.pause(time.monotonic() - paused)

    def _end_if_asked(self, process: _Process) -> None:
        """After a signal to any process: StoppedError, with a checkpoint of the step."""
        received = self._world.largest(process.stop.received or 0)
        if not received:
            return
        process.saver.save(self._progress)
        process.display.clear()
        name = signal.Signals(received).name
        self._world.fail(
            StoppedError(
                f"{self._folder.path}: stopped by {name} after step {self._progress.step}; run"
                " the same command again to continue from its checkpoint",
                received,
            )
        )

    def summary(self) -> dict[str, Json]:
        """The result, flat: where it is, its size, figures of the last evaluation, speed."""
        return summarise(self._folder, self._model, self._progress, self._splits)

    def _train_step(
        self, process: _Process, step: int, alpha: float, rate: float, batches: Iterator[Batch]
    ) -> None:
        """The next step and its figures. RunError if the loss is not finite."""
        own = self._own_logits
        if own is not None:
            own.begin_step(step)
        with process.saver.kept(lambda: self._progress):
            result = self._step(step, alpha, rate, process.clock.waiting(step_batches(batches)))
        self._count(step, result)
        if own is not None:
            own.end_step()
        speed = process.clock.step_done(result.num_tokens)
        limits = {name: value for name, value in speed.items() if name in LIMITS}
        speed |= self._world.largest_of_each(limits)
        figures = {
            "tokens": self._progress.tokens,
            "loss": result.loss,
            "lm": result.lm,
            "kd": result.kd,
            "alpha": alpha,
            "learning_rate": rate,
            "gradient_norm": result.gradient_norm,
        }
        process.display.trained(step, result.num_tokens, figures)
        process.metrics.write(step, TRAIN, figures)
        process.metrics.write_speed(step, {"tokens": self._progress.tokens, **speed})

    def _step(self, step: int, alpha: float, rate: float, batches: Iterator[Batch]) -> StepResult:
        """One step of AdamW."""
        torch.manual_seed(order_seed((self._config.seed + step) % (1 << 63), self._world.rank))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return optimizer_step(
            self._student,
            self._optimizer,
            batches,
            self._loss_of(objective=replace(self._objective, alpha=alpha)),
            gradient_clip=self._config.gradient_clip,
            autocast=self._autocast,
            world=self._world,
        )

    def _count(self, step: int, result: StepResult) -> None:
        """Count a step as done. RunError if its loss is not a number any more."""
        if not math.isfinite(result.loss + result.gradient_norm):
            self._world.fail(
                RunError(
                    f"{self._folder.path}: step {step}: loss {result.loss}, gradient norm"
                    f" {result.gradient_norm}; the run diverged, try a lower --learning-rate"
                )
            )
        assert result.positions is not None
        self._progress = replace(
            self._progress,
            step=step,
            positions=result.positions,
            tokens=self._progress.tokens + result.num_tokens,
            sequences=[
                sum(counts)
                for counts in zip(self._progress.sequences, result.num_sequences, strict=True)
            ],
        )

    def _evaluate_if_due(self, process: _Process) -> None:
        """Evaluate after the last step, unless that is done or not wanted.

        A signal ends it, and the run that continues does it again.
        """
        if not self._progress.evaluation_due or self._evaluation_dataset is None:
            return
        figures = evaluate(
            self._student,
            self._evaluation_dataset.split(VALIDATION),
            batch_sequences=self._config.micro_batch_sequences,
            world=self._world,
            autocast=self._autocast,
            bytes_of_tokens=self._bytes_of_tokens,
            asked_to_end=lambda: process.stop.received is not None,
        )
        if figures is None:
            return
        process.metrics.write(self._progress.step, VALIDATION, figures)
        self._progress = replace(self._progress, evaluation=figures, evaluation_due=False)
        process.saver.record(self._progress)

    def _batches(self, step_sequences: int) -> Iterator[Batch]:
        stream = Stream(
            splits=self._splits,
            shares=self._shares,
            seed=self._config.seed,
            window_row_groups=self._config.window_row_groups,
            step_lines=step_sequences,
        )
        batches = stream.batches(
            self._progress.positions,
            lines_done=self._progress.step * step_sequences,
            micro_batch_lines=self._config.micro_batch_sequences,
            columns=columns_to_read(self._config, segments=self._own_logits is not None),
            rank=self._world.rank,
            world_size=self._world.size,
        )
        return for_device(batches, self._world.device)
