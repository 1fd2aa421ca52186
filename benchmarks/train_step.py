"""What distillation costs a training step: whole steps, data from disk, side by side.

    python benchmarks/train_step.py [--json FILE]

Three students of the same shape take turns, in another order every round, each with its own data:

- torch: labels only, torch's chunked F.linear_cross_entropy, with the fastest of some chunk sizes
- lm:    labels only (alpha 0), the loss of student_train; ids and logprobs are not read
- kd:    labels and the teacher's kept entries (alpha 0.5)

A step is reading, forward, backward, clipping and AdamW. Ratios are medians over rounds, each of
two steps of one round, so that a machine that slows down for a while slows down both.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from synthetic_shards import make_shards
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shards.dataset import Dataset
from shards.layout import Layout
from student_train.batches import TARGET_COLUMNS, TOKEN_COLUMNS, Batch, training_batches
from student_train.config import TrainConfig
from student_train.distillation import Objective
from student_train.loss import IGNORE_INDEX, Loss
from student_train.model import head_weight, hidden_states
from student_train.order import Order
from student_train.presets import PRESETS
from student_train.read_ahead import ReadAhead
from student_train.step import autocast_for, batch_loss, make_optimizer, optimizer_step

CHUNK_ROWS = (256, 512, 1024)
VARIANTS = ("torch", "lm", "kd")


def torch_loss(model: PreTrainedModel, batch: Batch, *, chunk_rows: int) -> Loss:
    """The summed cross-entropy of a batch by torch's own chunked implementation."""
    weight = head_weight(model)
    hidden = hidden_states(model, batch.input_ids).flatten(0, 1)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=chunk_rows,
        acc_policy="accurate" if hidden.dtype != torch.float32 else "compact",
        acc_dtype=torch.float32,
    )
    total = F.linear_cross_entropy(
        hidden,
        weight,
        batch.labels.flatten(),
        reduction="sum",
        ignore_index=IGNORE_INDEX,
        options=options,
    ).float()
    return Loss(total, total, torch.zeros_like(total))


class Student:
    """One of the students that take turns."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterator[Batch],
        loss_of: Callable[[PreTrainedModel, Batch], Loss],
        config: TrainConfig,
    ) -> None:
        self.model = model
        self.batches = batches
        self.loss_of = loss_of
        self.optimizer = make_optimizer(model, config)
        self.autocast = autocast_for(config.dtype, next(model.parameters()).device)

    def step(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        optimizer_step(
            self.model,
            self.optimizer,
            islice(self.batches, 1),
            self.loss_of,
            gradient_clip=1.0,
            autocast=self.autocast,
        )
        return time.perf_counter() - started


def make_student(
    dataset: Dataset,
    preset: str,
    batch_sequences: int,
    dtype: str,
    variant: str,
    stack: ExitStack,
) -> Student:
    """A student with its own model, optimizer and read-ahead thread."""
    identity = dataset.identity
    torch.manual_seed(0)
    shape = PRESETS[preset].config_json(identity["vocab_size"], identity["sequence_length"], 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(device)
    split = dataset.split("train")
    batches = training_batches(
        split,
        Order(num_sequences=split.num_sequences, layout=Layout.of(identity), seed=0),
        start=0,
        step_lines=batch_sequences,
        micro_batch_lines=batch_sequences,
        columns=TARGET_COLUMNS if variant == "kd" else TOKEN_COLUMNS,
    )
    objective = Objective(kind="kld", alpha=0.5 if variant == "kd" else 0.0, temperature=1.0)
    loss_of: Callable[[PreTrainedModel, Batch], Loss] = partial(batch_loss, objective=objective)
    if variant == "torch":
        loss_of = partial(torch_loss, chunk_rows=CHUNK_ROWS[0])
    config = TrainConfig(shards=dataset.path, student=preset, out=Path(), tokens=1, dtype=dtype)
    return Student(model, stack.enter_context(ReadAhead(batches, 2)), loss_of, config)


def choose_chunk_rows(student: Student) -> int:
    """Give the torch student its fastest chunk size, the faster of two steps each."""
    seconds = {}
    for rows in CHUNK_ROWS:
        student.loss_of = partial(torch_loss, chunk_rows=rows)
        seconds[rows] = min(student.step(), student.step())
    best = min(seconds, key=lambda rows: seconds[rows])
    student.loss_of = partial(torch_loss, chunk_rows=best)
    return best


@click.command()
@click.option("--preset", default="demo", show_default=True)
@click.option("--vocab-size", default=49_152, show_default=True)
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--batch-sequences", default=4, show_default=True, help="Sequences of a step.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--rounds", default=15, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    preset: str,
    vocab_size: int,
    sequence_length: int,
    batch_sequences: int,
    dtype: str,
    rounds: int,
    json_file: Path | None,
) -> None:
    """Print seconds per step and ratios."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        dataset = make_shards(
            Path(folder) / "shards",
            num_sequences=max(64, 8 * batch_sequences),
            sequence_length=sequence_length,
            vocab_size=vocab_size,
        )
        students = {
            variant: make_student(dataset, preset, batch_sequences, dtype, variant, stack)
            for variant in VARIANTS
        }
        chunk_rows = choose_chunk_rows(students["torch"])
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for student in students.values():
            student.step()
        for number in range(rounds):
            turn = number % len(VARIANTS)
            for variant in VARIANTS[turn:] + VARIANTS[:turn]:
                seconds[variant].append(students[variant].step())
    report(seconds, batch_sequences * sequence_length, chunk_rows, dtype, json_file)


def report(
    seconds: dict[str, list[float]],
    step_tokens: int,
    chunk_rows: int,
    dtype: str,
    json_file: Path | None,
) -> None:
    """Print the table, and write it."""
    result: dict[str, object] = {
        "command": sys.argv,
        "torch_version": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "step_tokens": step_tokens,
        "torch_chunk_rows": chunk_rows,
    }
    click.echo(f"{'':8}{'s/step':>10}{'tokens/s':>12}")
    for variant, values in seconds.items():
        median = statistics.median(values)
        click.echo(f"{variant:8}{median:10.3f}{step_tokens / median:12,.0f}")
        result[variant] = {"seconds": median, "tokens_per_s": step_tokens / median}
    for name, above, below in (("kd / lm", "kd", "lm"), ("lm / torch", "lm", "torch")):
        ratios = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        ratio = statistics.median(ratios)
        click.echo(f"{name:12}{ratio:.3f}   (middle half {low:.3f} to {high:.3f}, want <= 1.05)")
        result[name] = {"ratio": ratio, "quartiles": [low, high]}
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
