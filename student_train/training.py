"""The steps of a training run, from wherever it was killed.

A step is a function of the weights, AdamW's moments and its number: data order, learning rate and
random numbers (dropout, in a student that has some) are computed from the number. So a run that
continues from a checkpoint repeats the uninterrupted one, bit for bit in float32 on a CPU with the
same number of threads, and its metrics are the same lines.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from transformers import PreTrainedModel

from shards.dataset import Dataset, Split
from shards.errors import RunError, ShardError, StoppedError
from shards.identity import Json
from shards.keep_method import KeepMethod
from student_train import checkpoint
from student_train.batches import (
    TAIL_COLUMNS,
    TARGET_COLUMNS,
    TOKEN_COLUMNS,
    Batch,
    training_batches,
)
from student_train.checkpoint import Progress
from student_train.config import TrainConfig
from student_train.distillation import Objective
from student_train.evaluate import evaluate
from student_train.flops import peak_tokens_per_s
from student_train.lines import Source
from student_train.metrics import Metrics
from student_train.mixture import choices, order_seed
from student_train.model import num_parameters
from student_train.prepare import VALIDATION, shares
from student_train.progress import TrainProgress
from student_train.read_ahead import ReadAhead
from student_train.run_folder import RunFolder
from student_train.schedules import Alpha, LearningRate, learning_rate
from student_train.speed import StepClock
from student_train.step import (
    StepResult,
    autocast_for,
    batch_loss,
    make_optimizer,
    optimizer_step,
)
from student_train.stop import StopRequest
from student_train.token_bytes import token_bytes

logger = logging.getLogger(__name__)

_READ_AHEAD_BATCHES = 4
TRAIN = "train"


class Training:
    """A model on its way: what all steps share, and how far they are."""

    def __init__(
        self,
        config: TrainConfig,
        splits: Sequence[Split],
        evaluation_dataset: Dataset | None,
        model: PreTrainedModel,
        folder: RunFolder,
    ) -> None:
        self._config = config
        self._splits = splits
        self._shares = shares(config, splits)
        self._length = splits[0].identity["sequence_length"]
        self._evaluation_dataset = evaluation_dataset
        self._folder = folder
        self._device = model.device
        self._autocast = autocast_for(config.dtype, self._device)
        self._objective = Objective(
            kind=config.loss,
            alpha=config.alpha,
            temperature=config.temperature,
            sampled=KeepMethod.of(splits[0].identity).is_sampled,
            bucket=config.tail == "bucket",
            student_temperature=config.student_temperature,
            adaptive_temperature=config.adaptive_temperature,
        )
        self._model = model.train()
        self._optimizer = make_optimizer(model, config)
        found = checkpoint.load_newest(folder.checkpoints, model, self._optimizer)
        self._progress = found or Progress(step=0, tokens=0, sequences=[0] * len(splits))
        self._saved_step = self._progress.step
        self._bytes_of_tokens = (
            None if evaluation_dataset is None else token_bytes(evaluation_dataset)
        )
        self._speed: dict[str, Json] = {}

    def train(self, step_sequences: int, num_steps: int) -> None:
        """All steps that are left, with their evaluations and checkpoints."""
        config, done = self._config, self._progress.step
        self._log_start(step_sequences, num_steps)
        rates, alphas = self._schedules(num_steps)
        step_batches = -(-step_sequences // config.micro_batch_sequences)
        batches = self._batches(step_sequences)
        peak = peak_tokens_per_s(self._model, self._length, config.dtype, self._device)
        clock = StepClock(self._device, peak)
        display = TrainProgress(done, num_steps, peak)
        with (
            Metrics(
                self._folder, step=done, evaluated=not self._progress.evaluation_due
            ) as metrics,
            ReadAhead(batches, _READ_AHEAD_BATCHES) as ahead,
            StopRequest() as stop,
        ):
            paused = time.monotonic()
            self._evaluate_if_due(metrics, stop)
            self._end_if_asked(metrics, stop, display)
            display.pause(time.monotonic() - paused)
            for step in range(done + 1, num_steps + 1):
                alpha, rate = alphas.at(step - 1), rates.at(step - 1)
                with self._saved_if_shards_fail(metrics):
                    micro_batches = clock.waiting(islice(ahead, step_batches))
                    result = self._step(step, alpha, rate, micro_batches)
                speed = clock.step_done(result.num_tokens)
                figures = {
                    "tokens": self._progress.tokens,
                    "loss": result.loss,
                    "lm": result.lm,
                    "kd": result.kd,
                    "alpha": alpha,
                    "learning_rate": rate,
                    "gradient_norm": result.gradient_norm,
                }
                display.trained(step, result.num_tokens, figures)
                metrics.write(step, TRAIN, figures)
                metrics.write_speed(step, {"tokens": self._progress.tokens, **speed})
                paused = time.monotonic()
                last = step == num_steps
                due = last or _due(step, config.eval_every)
                self._progress = replace(self._progress, evaluation_due=due)
                self._evaluate_if_due(metrics, stop)
                if last or _due(step, config.save_every):
                    self._save(metrics)
                self._end_if_asked(metrics, stop, display)
                display.pause(time.monotonic() - paused)
            self._end_if_asked(metrics, stop, display)
        display.clear()
        self._speed = {"seconds": display.seconds, "tokens_per_s": display.tokens_per_s}

    def _end_if_asked(self, metrics: Metrics, stop: StopRequest, display: TrainProgress) -> None:
        """After a signal: StoppedError, with a checkpoint of the step."""
        if stop.received is None:
            return
        if self._progress.step > self._saved_step:
            self._save(metrics)
        display.clear()
        raise StoppedError(
            f"{self._folder.path}: {stop.received.name} after step {self._progress.step}, its"
            " checkpoint is written; the same command continues",
            stop.received,
        )

    def _schedules(self, num_steps: int) -> tuple[LearningRate, Alpha]:
        config = self._config
        rates = learning_rate(
            config.lr_schedule,
            peak=config.learning_rate or 0.0,
            num_steps=num_steps,
            warmup_fraction=config.warmup_fraction,
            decay_fraction=config.decay_fraction,
            floor=config.min_learning_rate_ratio,
        )
        alphas = Alpha(
            kind=config.alpha_schedule,
            peak=config.alpha,
            num_steps=num_steps,
            warmup_fraction=config.warmup_fraction,
            decay_fraction=config.decay_fraction,
        )
        return rates, alphas

    def summary(self) -> dict[str, Json]:
        """What came out, flat: where it lies, its size, figures of the last evaluation, speed."""
        total, beside = num_parameters(self._model)
        epochs = [
            done / split.num_sequences
            for done, split in zip(self._progress.sequences, self._splits, strict=True)
        ]
        evaluation = self._progress.evaluation or {}
        return {
            "model": str(self._folder.model),
            "parameters": total,
            "parameters_beside_embedding": beside,
            "steps": self._progress.step,
            "tokens": self._progress.tokens,
            "epochs": epochs,
            **{f"{VALIDATION}_{name}": value for name, value in evaluation.items()},
            **self._speed,
        }

    def _step(self, step: int, alpha: float, rate: float, batches: Iterator[Batch]) -> StepResult:
        """One step. RunError if the loss is not a number any more."""
        torch.manual_seed((self._config.seed + step) % (1 << 63))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        result = optimizer_step(
            self._model,
            self._optimizer,
            batches,
            partial(batch_loss, objective=replace(self._objective, alpha=alpha)),
            gradient_clip=self._config.gradient_clip,
            autocast=self._autocast,
        )
        if not math.isfinite(result.loss + result.gradient_norm):
            raise RunError(
                f"{self._folder.path}: step {step}: loss {result.loss}, gradient norm"
                f" {result.gradient_norm}; the run diverged, a lower --learning-rate may help"
            )
        self._progress = replace(
            self._progress,
            step=step,
            tokens=self._progress.tokens + result.num_tokens,
            sequences=[
                before + found
                for before, found in zip(
                    self._progress.sequences, result.num_sequences, strict=True
                )
            ],
        )
        return result

    def _save(self, metrics: Metrics) -> None:
        metrics.flush()
        checkpoint.save(self._folder.checkpoints, self._model, self._optimizer, self._progress)
        self._saved_step = self._progress.step

    @contextmanager
    def _saved_if_shards_fail(self, metrics: Metrics) -> Iterator[None]:
        """Keep the steps that are done when a shard goes bad or vanishes under the run.

        A step takes its batches before it touches the weights, which are thus those of the last
        whole step; an evaluation does not touch them.
        """
        try:
            yield
        except ShardError:
            if self._progress.step > self._saved_step:
                self._save(metrics)
            raise

    def _evaluate_if_due(self, metrics: Metrics, stop: StopRequest) -> None:
        """Evaluate after the last step, unless that is done or not wanted.

        A signal ends it, and the run that continues makes up for it.
        """
        if not self._progress.evaluation_due or self._evaluation_dataset is None:
            return
        with self._saved_if_shards_fail(metrics):
            figures = evaluate(
                self._model,
                self._evaluation_dataset.split(VALIDATION),
                batch_sequences=self._config.micro_batch_sequences,
                device=self._device,
                autocast=self._autocast,
                bytes_of_tokens=self._bytes_of_tokens,
                asked_to_end=lambda: stop.received is not None,
            )
        if figures is None:
            return
        metrics.write(self._progress.step, VALIDATION, figures)
        self._progress = replace(self._progress, evaluation=figures, evaluation_due=False)

    def _batches(self, step_sequences: int) -> Iterator[Batch]:
        seed, first_line = self._config.seed, self._progress.step * step_sequences
        return training_batches(
            [
                Source.of(split, seed=order_seed(seed, number), start=start)
                for number, (split, start) in enumerate(
                    zip(self._splits, self._progress.sequences, strict=True)
                )
            ],
            choices(self._shares, seed=seed, first_line=first_line),
            step_lines=step_sequences,
            micro_batch_lines=self._config.micro_batch_sequences,
            columns=self._columns(),
        )

    def _columns(self) -> tuple[str, ...]:
        if self._config.reads_tail:
            return TAIL_COLUMNS
        return TARGET_COLUMNS if self._config.reads_entries else TOKEN_COLUMNS

    def _log_start(self, step_sequences: int, num_steps: int) -> None:
        total, beside = num_parameters(self._model)
        logger.info(
            "%s: %d parameters, %d beside embedding and head; %d steps of %d sequences",
            self._config.student,
            total,
            beside,
            num_steps,
            step_sequences,
        )
        if len(self._splits) > 1:
            positions = num_steps * step_sequences * self._length
            for split, share in zip(self._splits, self._shares, strict=True):
                logger.info(
                    "%s: %.1f %% of the lines, %.2f epochs",
                    split.path,
                    100 * share,
                    share * positions / split.num_positions,
                )
        if self._progress.step:
            logger.info("continuing after step %d", self._progress.step)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
