"""Whole training steps of the preset 330M, data from disk, with and without compiled blocks."""

from __future__ import annotations

from shards.process.allocator import choose_arrow_pool

choose_arrow_pool()  # as train-student does; before pyarrow is imported

import gc
import math
import statistics
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.check import Figures, expect, peak_bytes
from benchmarks.synthetic_shards import make_shards
from benchmarks.train_step import Shape, Student
from shards.dataset import Dataset
from student_train import memory


class Scale(NamedTuple):
    """Students, their data, and how many steps are measured."""

    shape: Shape
    vocab_size: int
    sequence_length: int
    steps: int


FULL = Scale(Shape("330M", 8, "bfloat16", compile=False), 151_936, 2048, 8)
SMALL = Scale(Shape("demo", 2, "bfloat16", compile=False), 1024, 64, 2)
WARM_UP = 3  # steps, which are compared
# Relative. Rounding grows with every step: AdamW turns the smallest gradients into whole steps.
FIRST_LOSS, LATER_LOSSES = 1e-3, 1e-2
FRESH_LOSS = 0.5  # nats that fresh weights may be from a uniform distribution


def train_step(folder: Path, small: bool) -> Figures:
    """Figures of students that train on labels only and with the teacher's entries."""
    scale = SMALL if small else FULL
    dataset = _make_dataset(folder, scale)
    figures = {name: _train(dataset, scale, name) for name in ("lm", "kd54")}
    first, uniform = figures["lm"]["losses"][0], math.log(scale.vocab_size)
    expect(abs(first - uniform) < FRESH_LOSS, f"first loss {first}, expected about {uniform}")
    return figures


def train_step_compiled(folder: Path, small: bool) -> Figures:
    """The same of a student with compiled blocks, and its first losses beside those without."""
    scale = SMALL if small else FULL
    dataset = _make_dataset(folder, scale)
    eager = _train(dataset, scale._replace(steps=0), "kd54")
    shape = replace(scale.shape, compile=True)
    compiled = _train(dataset, scale._replace(shape=shape), "kd54")
    pairs = zip(eager["losses"], compiled["losses"], strict=False)
    differences = [abs(found / expected - 1) for expected, found in pairs]
    expect(differences[0] < FIRST_LOSS, f"the first loss differs by {differences[0]:.1e}")
    worst = max(differences)
    expect(worst < LATER_LOSSES, f"the losses differ by {worst:.1e} within {WARM_UP} steps")
    return {"kd54": compiled, "loss_differences": differences}


def _make_dataset(folder: Path, scale: Scale) -> Dataset:
    return make_shards(
        folder / "dataset",
        num_sequences=8 * scale.shape.batch_sequences,
        sequence_length=scale.sequence_length,
        vocab_size=scale.vocab_size,
    )


def _train(dataset: Dataset, scale: Scale, variant: str) -> Figures:
    """Medians of the steps after the first `WARM_UP`, all losses, the peak of memory, its estimate.

    The peak is of tensors on a GPU; the estimate has what CUDA's libraries take besides.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with ExitStack() as stack:
        student = Student(dataset, scale.shape, variant, stack)
        steps = [student.step() for _ in range(WARM_UP + scale.steps)]
    losses = [step["loss"] for step in steps]
    expect(all(map(math.isfinite, losses)), f"losses {losses}")
    figures: Figures = {
        "losses": losses,
        "peak_bytes": peak_bytes(),
        "estimated_bytes": _estimated_bytes(student.model.config, scale),
    }
    measured = steps[WARM_UP:]
    for name in ("seconds", "tokens_per_s", "data_wait", "flop_utilisation"):
        values = [step[name] for step in measured if name in step]
        if values:  # no peak FLOP of this device are known
            figures[name] = statistics.median(values)
    return figures


def _estimated_bytes(model_config: Any, scale: Scale) -> int:
    """What train-student says before it starts that this takes on a GPU."""
    setting = memory.Setting(
        sequences=scale.shape.batch_sequences,
        length=scale.sequence_length,
        compiled=scale.shape.compile,
    )
    return memory.estimate(memory.Shape.of(model_config), setting).total
