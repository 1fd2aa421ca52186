"""A training run of one, two and three processes: time, memory and checkpoints of each.

`train-student` trains the same student on the same shards for the same steps, started by torchrun
on this machine with one thread per process. The runs take turns. A step of two processes on one
core each can at best be twice as fast as that of one.

- tokens/s: the median of the steps after the first two
- peak memory: of the first process, weights, gradients, moments and data
- checkpoint: bytes of the largest part, which one process writes, and of all
- apart: the largest difference of any step's loss from the loss of one process
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SEQUENCE_LENGTH, BATCH_SEQUENCES = 256, 12


def make_inputs(folder: Path, hidden_size: int, num_layers: int) -> None:
    from transformers import LlamaConfig

    from benchmarks.synthetic_shards import make_shards

    make_shards(
        folder / "shards", num_sequences=512, sequence_length=SEQUENCE_LENGTH, vocab_size=8192,
        row_group_tokens=8 << 10, entries=12,
    )  # fmt: skip
    LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=SEQUENCE_LENGTH,
    ).save_pretrained(folder)
    (folder / "config.json").rename(folder / "student.json")


def train(folder: Path, out: Path, processes: int, steps: int) -> dict[str, Any]:
    """Figures of one run."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    positions = BATCH_SEQUENCES * SEQUENCE_LENGTH
    subprocess.run(
        [
            *(sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "cli.py")),
            *("train-student", "--shards", str(folder / "shards"), "--out", str(out)),
            *("--student", str(folder / "student.json"), "--dtype", "float32"),
            *("--tokens", str(steps * positions), "--batch-tokens", str(positions)),
            *("--micro-batch-sequences", "2", "--learning-rate", "1e-3", "--device", "cpu"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    speed = [json.loads(line) for line in (out / "speed.jsonl").read_text().splitlines()]
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (newest,) = (out / "checkpoints").iterdir()
    parts = [file.stat().st_size for file in (newest / "weights").glob("*.distcp")]
    return {
        "tokens_per_s": median(line["tokens_per_s"] for line in speed[2:]),
        "data_wait": median(line["data_wait"] for line in speed[2:]),
        "peak_memory_bytes": speed[-1]["peak_memory_bytes"],
        "largest_part_bytes": max(parts),
        "checkpoint_bytes": sum(parts),
        "losses": [line["loss"] for line in losses if line["kind"] == "train"],
    }


@click.command()
@click.option("--processes", default=3, show_default=True, help="At most.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--steps", default=8, show_default=True)
@click.option("--hidden-size", default=384, show_default=True)
@click.option("--layers", default=8, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures.")
def main(
    processes: int,
    rounds: int,
    steps: int,
    hidden_size: int,
    layers: int,
    json_file: Path | None,
) -> None:
    """Print a table, one line per number of processes."""
    runs: dict[int, list[dict[str, Any]]] = {size: [] for size in range(1, processes + 1)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, hidden_size, layers)
        for number in range(rounds):
            for size, figures in runs.items():
                figures.append(train(folder, folder / f"run-{number}-{size}", size, steps))
    alone = runs[1][0]["losses"]
    click.echo("processes  tokens/s  data wait  peak MiB  largest part MiB  of MiB     apart")
    for size, figures in runs.items():
        wait = median(run["data_wait"] for run in figures)
        apart = max(
            abs(loss - expected)
            for run in figures
            for loss, expected in zip(run["losses"], alone, strict=True)
        )
        megabytes = [
            median(run[key] for run in figures) / (1 << 20)
            for key in ("peak_memory_bytes", "largest_part_bytes", "checkpoint_bytes")
        ]
        click.echo(
            f"{size:>9}{median(run['tokens_per_s'] for run in figures):>10,.0f}{wait:>11.2%}"
            f"{megabytes[0]:>10,.0f}{megabytes[1]:>18,.0f}{megabytes[2]:>8,.0f}{apart:>10.1e}"
        )
    if json_file is not None:
        json_file.write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
