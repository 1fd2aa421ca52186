"""Opening and resuming a dataset of up to a million shards: seconds and memory.

Only names count here: the shards are empty files in a temporary folder. The sidecar of a split's
last shard is a real one, since a listing reads it and no other. A shard stands for 2 million
tokens, so that a million shards are two trillion. The names lie in the page cache.

  open      a complete dataset: its manifest says so, and nothing is listed
  train     the first window of row groups that a run in the middle of its first epoch reads next
  reject    opening a dataset that lacks every hundredth shard, up to the error
  resume    what `dump-logits` does with that dataset, up to the first shard that it writes
  begin     the same with no shard there

Each runs in a fresh process. Memory is the process's peak above that with a dataset of one shard.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.example_spec import example_spec
from shards.dataset import Dataset
from shards.errors import ShardError
from shards.folder.continuing import create_or_continue, record_completeness, remove_old_temporaries
from shards.folder.listing import has_shards
from shards.keep import TopPK
from shards.layout import Layout
from shards.manifest import Manifest, SplitSize, load_manifest
from shards.sidecar import Sidecar, sidecar_path
from shards.spec import SPLITS, TRAIN
from shards.tokenizer.files import write_tokenizer
from shards.writer import shard_name
from student_train.data.order import Order, Position
from teacher_dump.processes.ranks import Rank
from teacher_dump.processes.shard_queue import ShardQueue

SEQUENCE_LENGTH = 2048
LAYOUT = Layout(sequences_per_shard=1024, sequences_per_row_group=64)
MISSING_STEP = 100  # of the incomplete dataset, each shard with a number that this divides


def make_manifest(path: Path, num_shards: int) -> Manifest:
    """A dataset of one split in which every shard is missing."""
    num_sequences = num_shards * LAYOUT.sequences_per_shard
    spec = example_spec(
        keep=TopPK(), layout=LAYOUT, vocab_size=49_152, sequence_length=SEQUENCE_LENGTH
    )
    size = SplitSize(sequences=num_sequences, positions=num_sequences * SEQUENCE_LENGTH)
    empty = SplitSize(sequences=0, positions=0)
    splits = {split: size if split == TRAIN else empty for split in SPLITS}
    write_tokenizer(path, {})
    return create_or_continue(path, spec, splits, {"engine": "none"}, {})


def make_files(folder: Path, num_shards: int) -> None:
    """Empty files under the names of all shards, and the last one's sidecar."""
    folder.mkdir()
    last = sidecar_path(folder / shard_name(num_shards - 1))
    for shard in range(num_shards):
        parquet = folder / shard_name(shard)
        for file in (parquet, sidecar_path(parquet)):
            if file != last:
                os.mknod(file)
    Sidecar(
        shard=num_shards - 1,
        split=TRAIN,
        first_sequence=LAYOUT.first_sequence(num_shards - 1),
        sequences=LAYOUT.sequences_per_shard,
        tokens=LAYOUT.sequences_per_shard * SEQUENCE_LENGTH,
        entries=0,
        bytes=0,
        teacher_nll=0.0,
        teacher_entropy=0.0,
        kept_mass=0.0,
        footer_sha256="",
        sha256="",
        chunks_crc32=[],
    ).write(last)


def open_complete(path: Path) -> None:
    """`train-student` and readers from Python."""
    assert Dataset.open(path).split_names == [TRAIN]


def first_window(path: Path) -> None:
    """The order of training from half an epoch on."""
    split = Dataset.open(path).split(TRAIN)
    order = Order(
        num_sequences=split.num_sequences, layout=split.spec.layout, seed=0, window_row_groups=8
    )
    middle = split.num_row_groups // order.num_members // 2
    assert next(order.windows(Position(epoch=0, window=middle, line=0))).row_groups


def reject(path: Path) -> None:
    """Opening what is not complete."""
    with suppress(ShardError):
        Dataset.open(path)
        raise AssertionError(f"{path}: opened")


def resume(path: Path) -> None:
    """The calls of `teacher_dump`, and what its pass counts before the first shard."""
    present = load_manifest(path)
    any(has_shards(path / split) for split in SPLITS)
    manifest = create_or_continue(
        path, present.spec, present.splits, present.recorded[0], present.tokenizer_files
    )
    remove_old_temporaries(path)
    queue = ShardQueue(path, manifest, Rank())
    plan = next(iter(queue))
    assert (plan.shard, plan.sequences) == (0, range(LAYOUT.sequences_per_shard))
    assert sum(len(run) for shards in queue.own.values() for run in shards.runs())


ACTIONS: dict[str, Callable[[Path], None]] = {
    "open": open_complete,
    "train": first_window,
    "reject": reject,
    "resume": resume,
    "begin": resume,
}


def peak_mib() -> float:
    """The most resident memory that this process has had, without that of the one it came from."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM")


def measure(action: str, path: Path) -> tuple[float, float, float]:
    """Seconds, seconds of CPU time, and the peak in MiB; to be called in a fresh process."""
    wall, used = time.perf_counter(), time.process_time()
    ACTIONS[action](path)
    return time.perf_counter() - wall, time.process_time() - used, peak_mib()


def measure_size(path: Path, num_shards: int, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Medians of every action on a dataset of this size, which is made in `path`."""
    figures = {}

    def run(actions: Iterable[str]) -> None:
        for action in actions:
            found = []
            for _ in range(rounds):
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, mp_context=context) as fresh:
                    found.append(fresh.submit(measure, action, path).result())
            wall, used, peak = map(statistics.median, zip(*found, strict=True))
            figures[action] = wall, used, peak

    manifest = make_manifest(path, num_shards)
    run(["begin"])
    make_files(path / TRAIN, num_shards)
    manifest = record_completeness(path, manifest)
    run(["open", "train"])
    for shard in range(0, num_shards, MISSING_STEP):
        parquet = path / TRAIN / shard_name(shard)
        parquet.unlink()
        sidecar_path(parquet).unlink()
    record_completeness(path, manifest)
    run(["reject", "resume"])
    return figures


@click.command()
@click.option("--shards", default="10000,100000,1000000", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
def main(shards: str, rounds: int, json_file: Path | None) -> None:
    """A million shards are two million files: as many inodes, and minutes to make and to remove."""
    records = []
    baseline: dict[str, tuple[float, float, float]] = {}
    click.echo(
        f"{'shards':>10}  {'action':<8}{'seconds':>9}{'CPU s':>9}{'MiB above one shard':>21}"
    )
    for num_shards in [1, *(int(part) for part in shards.split(","))]:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure_size(Path(folder), num_shards, rounds)
        baseline = baseline or figures
        for action in ACTIONS:
            wall, used, peak = figures[action]
            above = peak - baseline[action][2]
            click.echo(f"{num_shards:>10,}  {action:<8}{wall:>9.3f}{used:>9.3f}{above:>21.1f}")
            records.append(
                {
                    "shards": num_shards,
                    "action": action,
                    "seconds": wall,
                    "cpu_seconds": used,
                    "mib_above_one_shard": above,
                }
            )
    if json_file is not None:
        json_file.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
