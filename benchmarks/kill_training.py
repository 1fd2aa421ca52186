"""Kills a training run in the middle, continues it, and compares it with one left alone.

Each kill is `kill -9` of a run that has written a line of metrics: of its process, or with
`--processes 2` of one of them or of all, torchrun included. It comes at a uniformly
random time after that line, or while a checkpoint is being written: at least a fifth of the kills
do. Some processes are killed earlier, while they start; these kills do not count. When a run has
finished, the benchmark compares its weights and metrics byte for byte with those of the
uninterrupted run, and starts the next run. With `--save-logits` a run also saves the student's own
distributions, and the benchmark compares all files of these datasets. float32 on a CPU, one thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from shards.files.durable import is_temporary

COMPARED = ("model/model.safetensors", "metrics.jsonl")
STARTING, WRITING, REMOVING, ELSEWHERE = (
    "starting",
    "writing a checkpoint",
    "removing a checkpoint",
    "elsewhere in training",
)
# The share of processes killed while starting, and of counted kills during a checkpoint.
SHARE_STARTING, SHARE_WRITING = 0.1, 0.2
WRITING_S = 0.01  # of a checkpoint, from when its folder is seen


def _command(folder: Path, out: Path, processes: int, save_logits: bool) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return [
        *(sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "cli.py")),
        *("train-student", "--shards", str(folder / "shards")),
        *("--student", str(folder / "student.json"), "--out", str(out), "--dtype", "float32"),
        *(
            "--tokens",
            str(40_960 if processes == 1 else 10_240),
            "--batch-tokens",
            "256",
            "--micro-batch-sequences",
            "5",
        ),
        *("--learning-rate", "0.01", "--save-every", "4", "--eval-every", "10"),
        *(("--save-logits", str(_saved(out))) if save_logits else ()),
        *(
            ("--sequences-per-shard", "50", "--keep", "top-p-k", "--top-k", "8")
            if save_logits
            else ()
        ),
    ]


def _saved(out: Path) -> Path:
    """The dataset that a run saves."""
    return out.with_name(f"{out.name}-saved")


def _differences(out: Path, whole: Path) -> list[str]:
    """The files in which a run or its dataset is another than that of a run left alone."""
    names = [Path(name) for name in COMPARED]
    pairs = [(out / name, whole / name) for name in names]
    saved = {
        file.relative_to(folder)
        for folder in (_saved(out), _saved(whole))
        for file in folder.rglob("*")
        if file.is_file() and not is_temporary(file.name)
    }
    pairs += [(_saved(out) / name, _saved(whole) / name) for name in sorted(saved)]
    return [str(one) for one, other in pairs if _content(one) != _content(other)]


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def _make_inputs(folder: Path) -> None:
    from transformers import LlamaConfig

    from tests.tiny_dataset import make_dataset

    make_dataset(folder / "shards", train=100, validation=10)
    LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ).save_pretrained(folder)
    (folder / "config.json").rename(folder / "student.json")


class Process:
    """One process of a run, or torchrun with several, that is to be killed or to end."""

    def __init__(
        self, folder: Path, out: Path, processes: int, save_logits: bool, chance: random.Random
    ) -> None:
        self._out = out
        self._chance = chance
        self._processes = processes
        self._began = len(self._event_files())
        self._process = subprocess.Popen(
            _command(folder, out, processes, save_logits),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def trains(self) -> bool:
        """Wait for its first line of metrics; False if it ends without one."""
        # What killed ones left is cut off before the file of TensorBoard appears.
        if not self._wait(lambda: len(self._event_files()) > self._began):
            return False
        before = self._metrics_bytes()
        return self._wait(lambda: self._metrics_bytes() > before)

    def writes(self) -> bool:
        """Wait for a checkpoint that is being written; False if it ends without one."""
        return self._wait(lambda: _checkpoint_phase(self._out) == WRITING)

    def end(self, after_s: float | None) -> str | None:
        """Kill it after some time, None: never. What it was at, or None if it ended by itself."""
        try:
            self._process.wait(after_s)
        except subprocess.TimeoutExpired:
            self._kill()
            return _checkpoint_phase(self._out)
        if self._process.returncode:
            raise click.ClickException(f"exit code {self._process.returncode} after a kill")
        return None

    def _kill(self) -> None:
        """Kill one of several processes, or everything; then no process of the run is left."""
        pid = self._process.pid
        children = [int(child) for child in _children_of(pid)]
        victims = [pid, *children]
        if children and self._chance.random() < 0.5:
            victims = [self._chance.choice(children)]
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        self._process.wait()
        while any(Path(f"/proc/{child}/cmdline").exists() for child in children):
            time.sleep(0.01)

    def _wait(self, reached: Callable[[], bool]) -> bool:
        while self._process.poll() is None:
            if reached():
                return True
            time.sleep(0.0005)
        return False

    def _event_files(self) -> list[Path]:
        return list((self._out / "tensorboard").glob("*"))

    def _metrics_bytes(self) -> int:
        file = self._out / "metrics.jsonl"
        return file.stat().st_size if file.exists() else 0


def _children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()


def _checkpoint_phase(out: Path) -> str:
    """What is going on among the checkpoints: a hidden one is newer than the others, or old."""
    folder = out / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    hidden = [name.strip(".").partition(".")[0] for name in names if name.endswith(".tmp")]
    if not hidden:
        return ELSEWHERE
    whole = [name for name in names if not name.endswith(".tmp")]
    return WRITING if max(hidden) > max(whole, default="") else REMOVING


class Killing:
    """Runs that are killed, how often at what, and when that is enough."""

    def __init__(
        self, folder: Path, kills: int, seed: int, processes: int, save_logits: bool
    ) -> None:
        self.phases: Counter[str] = Counter()
        self._folder = folder
        self._kills = kills
        self._processes = processes
        self._save_logits = save_logits
        self._chance = random.Random(seed)
        process = self._start(folder / "whole")
        began = time.monotonic()
        process.trains()
        self._start_s = time.monotonic() - began
        process.end(None)
        self.train_s = time.monotonic() - began - self._start_s

    @property
    def in_training(self) -> int:
        """Kills after the first line of metrics."""
        return self.phases.total() - self.phases[STARTING]

    @property
    def enough(self) -> bool:
        """Whether there were as many as asked for, and enough of them at a checkpoint."""
        written = self.phases[WRITING] >= SHARE_WRITING * self._kills
        return written and self.in_training >= self._kills

    def run(self, out: Path) -> None:
        """One run, killed again and again until it comes to its end, or there is enough of it."""
        while True:
            process = self._start(out)
            phase = process.end(None) if self.enough else self._kill(process)
            if phase is None:
                return
            self.phases[phase] += 1

    def _start(self, out: Path) -> Process:
        return Process(self._folder, out, self._processes, self._save_logits, self._chance)

    def _kill(self, process: Process) -> str | None:
        """Kill a process; what it was at, or None if it ended before."""
        if self._chance.random() < SHARE_STARTING:
            return process.end(self._chance.uniform(0, self._start_s)) and STARTING
        if not process.trains():
            return process.end(None)
        after_s = self._chance.uniform(0, self.train_s)
        if self.phases[WRITING] > 1.5 * SHARE_WRITING * self.in_training:
            return process.end(after_s)
        time.sleep(after_s / 2)
        process.writes()
        return process.end(self._chance.uniform(0, WRITING_S))


@click.command()
@click.option("--kills", default=50, show_default=True, help="In training, not while it starts.")
@click.option("--seed", default=0, show_default=True)
@click.option("--processes", default=1, show_default=True, help="Of one run, by torchrun.")
@click.option("--save-logits", is_flag=True, help="Save the student's own distributions, too.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the counts.")
def main(kills: int, seed: int, processes: int, save_logits: bool, json_file: Path | None) -> None:
    """Kill a run, continue it, compare; exit code 1 if anything differs."""
    runs = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_inputs(folder)
        killing = Killing(folder, kills, seed, processes, save_logits)
        click.echo(f"left alone: {killing.train_s:.1f} s of training", err=True)
        while not killing.enough:
            out = folder / f"run-{runs}"
            killing.run(out)
            for file in _differences(out, folder / "whole"):
                raise click.ClickException(f"run {runs}: {file} differs")
            runs += 1
            click.echo(f"run {runs}: the same; {killing.in_training} kills so far", err=True)
    click.echo(
        f"{killing.in_training} kills in training and {killing.phases[STARTING]} before it, in"
        f" {runs} runs, all byte-identical in {', '.join(COMPARED)}"
        f"{' and the datasets that they saved' if save_logits else ''}"
    )
    for phase, count in killing.phases.most_common():
        click.echo(f"{count:>4} {phase}")
    if json_file is not None:
        counts = {"processes": processes, "runs": runs, "kills": dict(killing.phases)}
        json_file.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
