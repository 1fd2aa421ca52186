"""How fast shards become training batches, and that memory does not grow with the dataset.

    python benchmarks/read_speed.py [--json FILE]

Speed, in turns over the same files:

- bare:     pyarrow's ParquetFile(memory_map=True).read_row_group of the columns, nothing else, with
            Arrow's own choice of an allocator, in a process of its own
- same pool: the same with the allocator that train-student chooses, like all that follow
- batches:  tensors of the same columns as evaluation gets them, checksums included, in the
            order of the files
- shuffled: the same in the order of training, from somewhere in its endless stream
- padded:   shuffled, and the entries padded to rectangles, as the loss does it within a step

Decoding uses all cores, making and padding batches one; the figures per core are divided by the
number of them all. Sizes are the defaults of dump-logits and train-student.

Memory: the highest RssAnon (the process's own memory; mapped files are page cache and not in it)
over each quarter of one epoch of shuffled batches, in a fresh process each, for a dataset and for
one of four times the size.
"""

from __future__ import annotations

from shards.process.allocator import ARROW_POOL, choose_arrow_pool

choose_arrow_pool()  # as train-student does; before pyarrow is imported

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice, product, repeat
from pathlib import Path
from unittest.mock import patch

import click
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.synthetic_shards import MEAN_ENTRIES, make_shards
from shards.dataset import Dataset, Split
from student_train.data.batches import TARGET_COLUMNS, Batch, sequential_batches, training_batches
from student_train.data.lines import Source
from student_train.objective.loss import split_evenly

VOCAB_SIZE = 49_152
BATCH_SEQUENCES = 8
BLOCK_ROWS = 2048  # between those of the loss on a CPU and on a GPU, 256 and 5,461
COLUMNS = ["tokens", "ids", "logprobs"]
WINDOW_ROW_GROUPS = 8  # the default of train-student


def read_bare(folder: Path) -> float:
    """Decode the columns of every row group; seconds."""
    started = time.perf_counter()
    for path in sorted((folder / "train").glob("*.parquet")):
        file = pq.ParquetFile(path, memory_map=True)
        for group in range(file.num_row_groups):
            file.read_row_group(group, columns=COLUMNS)
    return time.perf_counter() - started


def read_batches(dataset: Dataset) -> float:
    """Make batches of all sequences; seconds."""
    started = time.perf_counter()
    batches = sequential_batches(
        dataset.split("train"), batch_lines=BATCH_SEQUENCES, columns=TARGET_COLUMNS
    )
    for _ in batches:
        pass
    return time.perf_counter() - started


def read_shuffled(dataset: Dataset, use: Callable[[Batch], object] = id) -> float:
    """Make batches of as many sequences in the order of training, and use each; seconds.

    The clock starts after the first window, because at the end as much is decoded in advance.
    """
    split = dataset.split("train")
    window = WINDOW_ROW_GROUPS * len(split.row_group_range(0)) // BATCH_SEQUENCES
    with closing(_shuffled(split)) as batches:
        next(islice(batches, window - 1, window))
        started = time.perf_counter()
        for batch in islice(batches, split.num_sequences // BATCH_SEQUENCES):
            use(batch)
        return time.perf_counter() - started


def pad(batch: Batch) -> None:
    """Make the rectangles of a batch, and forget them."""
    assert batch.entries is not None
    for _ in batch.entries.padded_blocks(
        split_evenly(torch.arange(batch.labels.numel()), BLOCK_ROWS)
    ):
        pass


def backend() -> str:
    """The allocator of this process' Arrow."""
    return str(pa.default_memory_pool().backend_name)


def plain_process() -> ProcessPoolExecutor:
    """A process whose Arrow has the allocator that it chooses itself."""
    process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with patch.dict(os.environ, {ARROW_POOL: ""}):  # is set, so it stays, and chooses nothing
        process.submit(os.getpid).result()  # starts it
    return process


def readers(plain: ProcessPoolExecutor) -> dict[str, Callable[[Dataset], float]]:
    """Those that take turns, by name."""
    return {
        "bare": lambda dataset: plain.submit(read_bare, dataset.path).result(),
        "same pool": lambda dataset: read_bare(dataset.path),
        "batches": read_batches,
        "shuffled": read_shuffled,
        "padded": partial(read_shuffled, use=pad),
    }


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no RssAnon")


def peaks_of(path: Path) -> list[int]:
    """The highest RssAnon in the quarters of an epoch, bytes; to be called in a fresh process."""
    dataset = Dataset.open(path)
    split = dataset.split("train")
    quarter = split.num_sequences // BATCH_SEQUENCES // 4
    batches = _shuffled(split)
    return [max(anonymous_bytes() for _ in islice(batches, quarter)) for _ in range(4)]


def _shuffled(split: Split) -> Generator[Batch]:
    return training_batches(
        [Source.of(split, seed=0, window_row_groups=WINDOW_ROW_GROUPS)],
        repeat(0),
        step_lines=BATCH_SEQUENCES,
        micro_batch_lines=BATCH_SEQUENCES,
        columns=TARGET_COLUMNS,
    )


def measure_speed(dataset: Dataset, rounds: int) -> dict[str, object]:
    """Medians over rounds in which all take a turn."""
    seconds: dict[str, list[float]] = {}
    with plain_process() as plain:
        pools = [backend(), plain.submit(backend).result()]
        turns = readers(plain)
        for number in range(rounds + 1):
            for name, read in turns.items():
                elapsed = read(dataset)
                if number:
                    seconds.setdefault(name, []).append(elapsed)
    sidecars = list(dataset.split("train").sidecars())
    num_entries = sum(sidecar.entries for sidecar in sidecars)
    num_tokens = sum(sidecar.tokens for sidecar in sidecars)
    result: dict[str, object] = {
        "tokens": num_tokens,
        "entries": num_entries,
        "bytes": sum(sidecar.bytes for sidecar in sidecars),
        "pools": pools,
    }
    click.echo(f"{num_tokens:,} tokens, {num_entries / num_tokens:.1f} entries/token")
    click.echo(f"allocator {pools[0]}, of bare {pools[1]}")
    cores = pa.cpu_count()
    click.echo(f"{'':10}{'M tokens/s':>12}{'M entries/s':>13}   per core, {cores} of them")
    for name, values in seconds.items():
        median = statistics.median(values)
        tokens_per_s, entries_per_s = num_tokens / median / cores, num_entries / median / cores
        click.echo(f"{name:10}{tokens_per_s / 1e6:12.2f}{entries_per_s / 1e6:13.1f}")
        result[name] = {
            "seconds": median,
            "tokens_per_s_and_core": tokens_per_s,
            "entries_per_s_and_core": entries_per_s,
        }
    for above, below in product(("batches", "shuffled", "padded"), ("bare", "same pool")):
        ratios = [a / b for a, b in zip(seconds[below], seconds[above], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        wanted = ", want >= 0.8" if below == "bare" else ""
        click.echo(
            f"{above} reach {median:.2f} of {below} (middle half {low:.2f} to {high:.2f}){wanted}"
        )
        result[f"{above} / {below}"] = {"median": median, "middle half": [low, high]}
    return result


def measure_memory(folder: Path, sequence_length: int, factor: int) -> dict[str, object]:
    """Peaks for a dataset of four windows of row groups and for one of `factor` times as many."""
    row_group_tokens = 32 << 10
    context = multiprocessing.get_context("spawn")
    peaks: dict[str, list[int]] = {}
    sizes = {}
    for name, num_groups in (("small", 32), ("large", 32 * factor)):
        dataset = make_shards(
            folder / name,
            num_sequences=num_groups * row_group_tokens // sequence_length,
            sequence_length=sequence_length,
            vocab_size=VOCAB_SIZE,
            row_group_tokens=row_group_tokens,
        )
        with ProcessPoolExecutor(1, mp_context=context) as fresh:
            peaks[name] = fresh.submit(peaks_of, dataset.path).result()
        sizes[name] = sum(sidecar.bytes for sidecar in dataset.split("train").sidecars())
    growth = max(peaks["large"]) / max(peaks["small"])
    click.echo("RssAnon at most, MiB, in the quarters of an epoch")
    for name, quarters in peaks.items():
        texts = " ".join(f"{peak / 2**20:5.0f}" for peak in quarters)
        click.echo(f"{sizes[name] / 1e9:.2f} GB of shards: {texts}")
    return {"peak_bytes": peaks, "bytes": sizes, "growth": growth}


@click.command()
@click.option("--sequence-length", default=2048, show_default=True)
@click.option("--row-groups", default=32, show_default=True, help="Of 128k tokens, for speed.")
@click.option("--entries", default=MEAN_ENTRIES, show_default=True, help="Mean per position.")
@click.option("--rounds", type=click.IntRange(2), default=15, show_default=True)
@click.option(
    "--memory-factor", default=4, show_default=True, help="Size of the larger dataset, for memory."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    sequence_length: int,
    row_groups: int,
    entries: int,
    rounds: int,
    memory_factor: int,
    json_file: Path | None,
) -> None:
    """Print speeds, their ratio, and peaks of memory."""
    torch.set_num_threads(1)  # Arrow's threads have all cores; waiting for one would be measured
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = make_shards(
            folder / "speed",
            num_sequences=row_groups * (128 << 10) // sequence_length,
            sequence_length=sequence_length,
            vocab_size=VOCAB_SIZE,
            entries=entries,
        )
        result: dict[str, object] = {
            "command": sys.argv,
            "pyarrow_version": pa.__version__,
            "threads": pa.cpu_count(),
            **measure_speed(dataset, rounds),
            "memory": measure_memory(folder, sequence_length, memory_factor),
        }
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
