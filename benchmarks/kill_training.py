"""Kills a training run at random instants, continues it, and compares it with one left alone.

Each kill is `kill -9` at a uniformly random time after the process began, also while it starts,
evaluates or writes a checkpoint (checkpoints are frequent here, so that some kills hit one). When
a run has come to its end, weights and metrics are compared byte for byte with those of the
uninterrupted run, and the next run begins. float32 on a CPU, one thread.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
COMPARED = ("model/model.safetensors", "metrics.jsonl")


def _command(folder: Path, out: Path) -> list[str]:
    return [
        *(
            sys.executable,
            str(ROOT / "cli.py"),
            "train-student",
            "--shards",
            str(folder / "shards"),
        ),
        *("--student", str(folder / "student.json"), "--out", str(out), "--dtype", "float32"),
        *("--tokens", "40960", "--batch-tokens", "256", "--micro-batch-sequences", "5"),
        *("--learning-rate", "0.01", "--save-every", "4", "--eval-every", "30"),
    ]


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


def _phase(out: Path) -> str:
    """What a process that was just killed was at."""
    if any((out / "checkpoints").glob(".*.tmp")):
        return "writing a checkpoint"
    if any(out.glob(".*.tmp")):
        return "writing another file"
    return "elsewhere"


@click.command()
@click.option("--kills", default=50, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the counts.")
def main(kills: int, seed: int, json_file: Path | None) -> None:
    """Kill a run, continue it, compare; exit code 1 if anything differs."""
    chance = random.Random(seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    phases: Counter[str] = Counter()
    runs = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_inputs(folder)
        started = time.monotonic()
        subprocess.run(
            _command(folder, folder / "whole"), env=environment, check=True, capture_output=True
        )
        whole_s = time.monotonic() - started
        click.echo(f"left alone: {whole_s:.1f} s", err=True)
        while phases.total() < kills:
            out = folder / f"run-{runs}"
            while True:
                process = subprocess.Popen(
                    _command(folder, out),
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                try:
                    process.wait(chance.uniform(0, whole_s) if phases.total() < kills else None)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    phases[_phase(out)] += 1
                    continue
                if process.returncode:
                    raise click.ClickException(f"exit code {process.returncode} after a kill")
                break
            for file in COMPARED:
                if (out / file).read_bytes() != (folder / "whole" / file).read_bytes():
                    raise click.ClickException(f"run {runs}: {file} differs")
            runs += 1
            click.echo(f"run {runs}: the same; {phases.total()} kills so far", err=True)
    click.echo(
        f"{phases.total()} kills in {runs} runs, all byte-identical in {', '.join(COMPARED)}"
    )
    for phase, count in phases.most_common():
        click.echo(f"{count:>4} while {phase}" if phase != "elsewhere" else f"{count:>4} elsewhere")
    if json_file is not None:
        counts = {"runs": runs, "kills": dict(phases)}
        json_file.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
