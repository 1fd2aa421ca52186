"""What distillation costs a training step: whole steps, data from disk, side by side.

    python benchmarks/train_step.py [--vocab-size V] [--compile] [--json FILE]

Students of the same shape take turns, in another order every round, each with its own data:

- torch: labels only, torch's chunked F.linear_cross_entropy, with the fastest of some chunk sizes;
         when memory is measured, with those that it chooses itself, which take the least
- lm:    labels only (alpha 0), the loss of student_train; ids and logprobs are not read
- kd12:  labels and the teacher's kept entries (alpha 0.5), 12 per position on average
- kd54:  the same with 54
- dense: the same targets as kd54, scattered into a tensor [T, V] beside all logits, by autograd

and, where --variant asks for them, other objectives with the 54 entries of kd54:

- bucket: all that was not kept is one more class
- mse:    squared distance of the logits
- tau2:   teacher and student at temperature 2

With --compile the transformer blocks of all of them are compiled, as by train-student.

A step is reading, forward, backward, clipping and AdamW. Ratios are medians over rounds, each of
two steps of one round, so that a machine that slows down for a while slows down both. Data wait is
the part of a step spent waiting for its batch. Peak memory is that of a fresh process per student
over a few steps (on a GPU, of its tensors), with everything that Python and torch have loaded.
"""

from __future__ import annotations

from shards.process.allocator import choose_arrow_pool

choose_arrow_pool()  # as train-student does; before pyarrow is imported

import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, repeat
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch.distributed import is_initialized
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.synthetic_shards import make_shards
from shards.dataset import Dataset
from student_train.config import TrainConfig
from student_train.data.batches import (
    TAIL_COLUMNS,
    TARGET_COLUMNS,
    TOKEN_COLUMNS,
    Batch,
    for_device,
    training_batches,
)
from student_train.data.lines import Source
from student_train.data.read_ahead import ReadAhead
from student_train.flops import peak_tokens_per_s
from student_train.model.blocks import decoder_blocks, prepare_blocks
from student_train.model.model import head_weight, hidden_states
from student_train.model.presets import PRESETS
from student_train.objective.distillation import Objective
from student_train.objective.loss import IGNORE_INDEX, Loss
from student_train.processes.sharding import is_sharded, precision_for, shard
from student_train.processes.world import World, joined
from student_train.speed import StepClock
from student_train.step import autocast_for, batch_loss, make_optimizer, optimizer_step

CHUNK_ROWS = (256, 512, 1024, 2048, 4096, 8192)  # those above the rows of a step are left out
ENTRIES = {
    **{"torch": 12, "lm": 12, "kd12": 12, "kd54": 54, "dense": 54},
    **{"bucket": 54, "mse": 54, "tau2": 54},
}
DEFAULT = ("torch", "lm", "kd12", "kd54", "dense")
ALPHA = 0.5
KLD = Objective(kind="kld", alpha=ALPHA, temperature=1.0)
OBJECTIVES = {
    "lm": replace(KLD, alpha=0.0),
    "kd12": KLD,
    "kd54": KLD,
    "bucket": replace(KLD, bucket=True),
    "mse": replace(KLD, kind="mse"),
    "tau2": replace(KLD, temperature=2.0, student_temperature=2.0),
}
MEMORY_STEPS = 3
RATIOS = (
    ("kd12 / lm", "kd12", "lm", "want <= 1.03"),
    ("kd54 / lm", "kd54", "lm", "want <= 1.03"),
    ("bucket / lm", "bucket", "lm", ""),
    ("mse / lm", "mse", "lm", ""),
    ("tau2 / lm", "tau2", "lm", ""),
    ("lm / torch", "lm", "torch", "want <= 1.03"),
    ("kd12 / torch", "kd12", "torch", "want memory <= 1.05"),
    ("kd54 / torch", "kd54", "torch", "want memory <= 1.05"),
    ("dense / kd54", "dense", "kd54", ""),
)


@dataclass(frozen=True)
class Shape:
    """What all students have in common."""

    preset: str
    batch_sequences: int
    dtype: str
    compile: bool


def torch_loss(model: PreTrainedModel, batch: Batch, *, chunk_rows: int | None) -> Loss:
    """The summed cross-entropy of a batch by torch's own chunked implementation.

    Without `chunk_rows` it chooses for itself.
    """
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


def dense_loss(model: PreTrainedModel, batch: Batch) -> Loss:
    """LM and KD as they are written down first: all logits and all targets at once."""
    assert batch.entries is not None
    hidden = hidden_states(model, batch.input_ids).flatten(0, 1)
    logs = torch.log_softmax((hidden @ head_weight(model).T).float(), 1)
    ids, logprobs = batch.entries.padded(torch.arange(len(hidden), device=hidden.device))
    target = torch.zeros_like(logs).scatter_add_(1, ids, torch.softmax(logprobs, 1))
    lm = F.nll_loss(logs, batch.labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
    kd = F.kl_div(logs, target, reduction="sum")
    return Loss((1 - ALPHA) * lm + ALPHA * kd, lm.detach(), kd.detach())


class Student:
    """One of the students that take turns, with its own model, optimizer and read-ahead thread."""

    def __init__(self, dataset: Dataset, shape: Shape, variant: str, stack: ExitStack) -> None:
        length = dataset.spec.sequence_length
        torch.manual_seed(0)
        config = PRESETS[shape.preset].config_json(dataset.spec)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        batches = training_batches(
            [Source.of(dataset.split("train"), seed=0, window_row_groups=8)],
            repeat(0),
            step_lines=shape.batch_sequences,
            micro_batch_lines=shape.batch_sequences,
            columns=_columns(variant),
        )
        options = TrainConfig(
            shards=[dataset.path],
            student=shape.preset,
            out=Path(),
            tokens=1,
            micro_batch_sequences=shape.batch_sequences,
            dtype=shape.dtype,
            compile=shape.compile,
        )
        world = World(device=device)
        if is_sharded(world) and not is_initialized():
            stack.enter_context(joined(device, {}))
        self.model = LlamaForCausalLM(LlamaConfig(**config)).to(device)
        self.batches: Iterator[Batch] = stack.enter_context(
            ReadAhead(for_device(batches, device), 2)
        )
        self.loss_of = _loss_of(variant)
        prepare_blocks(
            options,
            self.model.train(),
            sequence_length=length,
            packed=False,
            autocast=autocast_for(shape.dtype, device),
        )
        precision = precision_for(shape.dtype, device)
        self.student = shard(self.model, decoder_blocks(self.model), world, precision)
        self.optimizer = make_optimizer(self.student, options)
        self.autocast = autocast_for(shape.dtype, device, sharded=is_sharded(world))
        peak = peak_tokens_per_s(self.model, length, shape.dtype, device)
        self.clock = StepClock(device, peak)

    def step(self) -> dict[str, float]:
        """Figures of one step, `loss`, `seconds` and `data_wait` among them."""
        result = optimizer_step(
            self.student,
            self.optimizer,
            self.clock.waiting(islice(self.batches, 1)),
            self.loss_of,
            gradient_clip=1.0,
            autocast=self.autocast,
        )
        return {**self.clock.step_done(result.num_tokens), "loss": result.loss}


def _columns(variant: str) -> tuple[str, ...]:
    """What a student reads of its shards."""
    if variant in ("torch", "lm"):
        return TOKEN_COLUMNS
    return TAIL_COLUMNS if variant == "bucket" else TARGET_COLUMNS


def _loss_of(variant: str) -> Callable[[PreTrainedModel, Batch], Loss]:
    if variant == "torch":
        return partial(torch_loss, chunk_rows=CHUNK_ROWS[0])
    if variant == "dense":
        return dense_loss
    return partial(batch_loss, objective=OBJECTIVES[variant])


def choose_chunk_rows(student: Student, step_tokens: int) -> int:
    """Give the torch student its fastest chunk size, the faster of two steps each."""
    seconds = {}
    for rows in [rows for rows in CHUNK_ROWS if rows <= max(step_tokens, CHUNK_ROWS[0])]:
        student.loss_of = partial(torch_loss, chunk_rows=rows)
        seconds[rows] = min(student.step()["seconds"], student.step()["seconds"])
    best = min(seconds, key=lambda rows: seconds[rows])
    student.loss_of = partial(torch_loss, chunk_rows=best)
    return best


def peak_memory(path: Path, shape: Shape, variant: str) -> float:
    """Bytes over a few steps; to be called in a fresh process."""
    with ExitStack() as stack:
        student = Student(Dataset.open(path), shape, variant, stack)
        if variant == "torch":
            student.loss_of = partial(torch_loss, chunk_rows=None)
        figures = [student.step() for _ in range(MEMORY_STEPS)][-1]
    return figures.get("peak_cuda_memory_bytes", figures["peak_memory_bytes"])


def take_turns(
    datasets: dict[str, Dataset], shape: Shape, rounds: int
) -> tuple[dict[str, list[dict[str, float]]], int]:
    """Figures of every step of every student, and torch's fastest chunk size."""
    names = list(datasets)
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    chunk_rows = CHUNK_ROWS[0]
    with ExitStack() as stack:
        students = {name: Student(data, shape, name, stack) for name, data in datasets.items()}
        if "torch" in students:
            length = datasets["torch"].spec.sequence_length
            chunk_rows = choose_chunk_rows(students["torch"], shape.batch_sequences * length)
        for student in students.values():
            student.step()
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                figures[name].append(students[name].step())
    return figures, chunk_rows


def measure_memory(datasets: dict[str, Dataset], shape: Shape) -> dict[str, float]:
    """The peak of every student, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for name, dataset in datasets.items():
        with ProcessPoolExecutor(1, mp_context=context) as fresh:
            task = fresh.submit(peak_memory, dataset.path, shape, name)
            peaks[name] = task.result()
    return peaks


@click.command()
@click.option("--preset", default="demo", show_default=True)
@click.option("--vocab-size", default=49_152, show_default=True)
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--batch-sequences", default=4, show_default=True, help="Sequences of a step.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--rounds", type=click.IntRange(2), default=15, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Compile the transformer blocks.")
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(ENTRIES)),
              default=DEFAULT, show_default=True, help="Repeatable.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    preset: str,
    vocab_size: int,
    sequence_length: int,
    batch_sequences: int,
    dtype: str,
    rounds: int,
    compiled: bool,
    variants: tuple[str, ...],
    json_file: Path | None,
) -> None:
    """Print seconds per step, data wait, peak memory and ratios."""
    shape = Shape(preset, batch_sequences, dtype, compiled)
    names = [name for name in ENTRIES if name in variants]
    with tempfile.TemporaryDirectory() as folder:
        datasets = {
            entries: make_shards(
                Path(folder) / str(entries),
                num_sequences=max(64, 8 * batch_sequences),
                sequence_length=sequence_length,
                vocab_size=vocab_size,
                entries=entries,
            )
            for entries in {ENTRIES[name] for name in names}
        }
        students_of = {name: datasets[ENTRIES[name]] for name in names}
        figures, chunk_rows = take_turns(students_of, shape, rounds)
        peaks = measure_memory(students_of, shape)
    about = {
        "command": sys.argv,
        "torch_version": torch.__version__,
        "device": device_name(),
        "shape": asdict(shape),
        "step_tokens": batch_sequences * sequence_length,
        "torch_chunk_rows": chunk_rows,
    }
    report(figures, peaks, about, json_file)


def device_name() -> str:
    """The GPU, or how many threads of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads"


def report(
    figures: dict[str, list[dict[str, float]]],
    peaks: dict[str, float],
    about: dict[str, object],
    json_file: Path | None,
) -> None:
    """Print the tables, and write them."""
    result: dict[str, object] = dict(about)
    seconds = {name: [step["seconds"] for step in steps] for name, steps in figures.items()}
    click.echo(f"{about['device']}, torch's chunks of {about['torch_chunk_rows']} rows when timed")
    click.echo(f"{'':8}{'s/step':>10}{'tokens/s':>12}{'data wait':>12}{'peak MiB':>12}{'(MFU)':>8}")
    for name, steps in figures.items():
        median = statistics.median(seconds[name])
        speed = statistics.median(step["tokens_per_s"] for step in steps)
        wait = statistics.median(step["data_wait"] for step in steps)
        mebibytes = peaks[name] / 2**20
        used = [step["flop_utilisation"] for step in steps if "flop_utilisation" in step]
        utilisation = statistics.median(used) if used else None  # of a GPU that is known
        click.echo(
            f"{name:8}{median:10.3f}{speed:12,.0f}{100 * wait:10.2f} %{mebibytes:12,.0f}"
            + ("" if utilisation is None else f"{utilisation:8.1%}")
        )
        result[name] = {
            "flop_utilisation": utilisation,
            "seconds": median,
            "tokens_per_s": speed,
            "data_wait": wait,
            "peak_bytes": peaks[name],
        }
    for name, above, below, wanted in RATIOS:
        if above not in seconds or below not in seconds:
            continue
        ratios = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        ratio, memory = statistics.median(ratios), peaks[above] / peaks[below]
        click.echo(
            f"{name:12}{ratio:7.3f}   (middle half {low:.3f} to {high:.3f}; memory {memory:.3f})"
            f"   {wanted}"
        )
        result[name] = {"ratio": ratio, "quartiles": [low, high], "memory": memory}
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
