"""What the selection costs per position, against a copy of the logits on the same device.

    python benchmarks/selection_speed.py [--device cuda] [--vocab-size 151936] [--json FILE]

copy       the logits are copied once: a read and a write of everything
softmax    torch.softmax of them, into a buffer
top-p-k, draws, threshold
           all that the teacher pass makes of a block of logits with that keep method and the
           defaults of `dump-logits`, packed

Logits are normal with a deviation of 3, in float32. Variants take turns; medians over rounds. A
GPU is waited for.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from shards.keep import KEEP_METHODS
from shards.process.allocator import keep_freed_tensors
from teacher_dump.keep.compiling import WORTH_COMPILING
from teacher_dump.keep.selection import make_selector, select_in_blocks

METHODS = ("top-p-k", "draws", "threshold")


def variants(logits: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, over all rows of the logits [T, V]."""
    num_rows, vocab_size = logits.shape
    other = torch.empty_like(logits)
    labels = torch.zeros(num_rows, dtype=torch.int64, device=logits.device)
    keys = torch.arange(num_rows, device=logits.device)
    found: dict[str, Callable[[], Any]] = {
        "copy": lambda: other.copy_(logits),
        "softmax": lambda: torch.softmax(logits, -1, out=other),
    }
    for name in METHODS:
        select = make_selector(KEEP_METHODS[name](), vocab_size)
        found[name] = partial(select_in_blocks, select, logits, labels, keys)
    return found


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """One call, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(
    timed: dict[str, Callable[[], Any]], warm_up: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every round by variant, after those that end with all of them compiled."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(warm_up + rounds):
        for name, function in timed.items():
            elapsed = seconds_of(function, device)
            if number >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def name_of(device: torch.device) -> str:
    """What the figures belong to."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads"


@click.command()
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--vocab-size", default=151_936, show_default=True)
@click.option("--positions", default=1024, show_default=True, help="Of one round.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
def main(device: str, vocab_size: int, positions: int, rounds: int, json_file: Path | None) -> None:
    """Microseconds per position of every keep method and of a copy."""
    keep_freed_tensors()  # as dump-logits does
    where = torch.device(device)
    generator = torch.Generator(where).manual_seed(0)
    logits = 3 * torch.randn((positions, vocab_size), generator=generator, device=where)
    warm_up = 2 + WORTH_COMPILING // logits.nbytes
    seconds = measure(variants(logits), warm_up, rounds, where)
    name = name_of(where)
    click.echo(f"{name}, V = {vocab_size:,}, {positions} positions")
    click.echo(f"{'':<12}{'us/position':>12}{'copies':>10}")
    figures: dict[str, Any] = {"command": sys.argv, "device": name}
    for variant, values in seconds.items():
        microseconds = statistics.median(values) / positions * 1e6
        copies = statistics.median(a / b for a, b in zip(values, seconds["copy"], strict=True))
        figures[variant] = {"us_per_position": microseconds, "copies": copies}
        click.echo(f"{variant:<12}{microseconds:>12.2f}{copies:>10.2f}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
