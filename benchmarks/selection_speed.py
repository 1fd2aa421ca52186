"""What the selection costs per position, against a copy of the logits on the same device.

    python benchmarks/selection_speed.py [--device cuda] [--vocab-size 151936] [--json FILE]

copy          the logits are copied once: a read and a write of everything
softmax       torch.softmax of them, into a buffer
softmax+topk  torch.softmax and torch.topk, the least that any top-k selection by torch does
plain         top-p-k by one operation of torch after the other (`plain_selection.py`)
top-p-k, draws, threshold
              all that the teacher pass makes of a block of logits with that keep method and the
              defaults of `dump-logits`, packed

Logits are normal with a deviation of 3, in float32. Variants take turns; medians over rounds, each
of which waits until the GPU is done. With --uncompiled the pass over the logits stays uncompiled.
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

from benchmarks.plain_selection import PlainSelector
from shards.keep import KEEP_METHODS, TopPK
from shards.process.allocator import keep_freed_tensors
from teacher_dump.keep.compiling import WORTH_COMPILING
from teacher_dump.keep.selection import Selector, make_selector, select_in_blocks

METHODS = ("top-p-k", "draws", "threshold")


def make_selectors(vocab_size: int) -> dict[str, Selector]:
    """Those that are timed, by the names of their variants."""
    selectors: dict[str, Selector] = {"plain": PlainSelector(TopPK(), vocab_size)}
    for name in METHODS:
        selectors[name] = make_selector(KEEP_METHODS[name](), vocab_size)
    return selectors


def variants(logits: torch.Tensor, selectors: dict[str, Selector]) -> dict[str, Callable[[], Any]]:
    """What is timed, over all rows of the logits [T, V]."""
    num_rows = len(logits)
    other = torch.empty_like(logits)
    labels = torch.zeros(num_rows, dtype=torch.int64, device=logits.device)
    keys = torch.arange(num_rows, device=logits.device)
    timed: dict[str, Callable[[], Any]] = {
        "copy": lambda: other.copy_(logits),
        "softmax": lambda: torch.softmax(logits, -1, out=other),
        "softmax+topk": lambda: torch.topk(torch.softmax(logits, -1, out=other), TopPK().top_k),
    }
    for name, select in selectors.items():
        timed[name] = partial(select_in_blocks, select, logits, labels, keys)
    return timed


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
    timed: dict[str, Callable[[], Any]], logits: torch.Tensor, rounds: int, *, compiled: bool
) -> dict[str, list[float]]:
    """Seconds of every round by variant, after those that end with all of them compiled, or not."""
    device = logits.device
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    warm_up = 2 + (WORTH_COMPILING // logits.nbytes if compiled else 0)
    with torch._dynamo.config.patch(disable=not compiled):
        for number in range(warm_up + rounds):
            for name, function in timed.items():
                elapsed = seconds_of(function, device)
                if number >= warm_up:
                    seconds[name].append(elapsed)
    return seconds


def figures_of(seconds: dict[str, list[float]], positions: int) -> dict[str, dict[str, float]]:
    """Microseconds per position, and how many copies of the logits take as long: medians."""
    return {
        variant: {
            "us_per_position": statistics.median(values) / positions * 1e6,
            "copies": statistics.median(
                a / b for a, b in zip(values, seconds["copy"], strict=True)
            ),
        }
        for variant, values in seconds.items()
    }


def make_logits(positions: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Normal ones with a deviation of 3, [T, V] float32."""
    generator = torch.Generator(device).manual_seed(0)
    return 3 * torch.randn((positions, vocab_size), generator=generator, device=device)


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
@click.option("--uncompiled", is_flag=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
def main(
    device: str,
    vocab_size: int,
    positions: int,
    rounds: int,
    uncompiled: bool,
    json_file: Path | None,
) -> None:
    """Microseconds per position of every keep method and of a copy."""
    keep_freed_tensors()  # as dump-logits does
    where = torch.device(device)
    logits = make_logits(positions, vocab_size, where)
    timed = variants(logits, make_selectors(vocab_size))
    seconds = measure(timed, logits, rounds, compiled=not uncompiled)
    name = name_of(where)
    figures = figures_of(seconds, positions)
    click.echo(f"{name}, V = {vocab_size:,}, {positions} positions")
    click.echo(f"{'':<14}{'us/position':>12}{'copies':>10}")
    for variant, values in figures.items():
        click.echo(f"{variant:<14}{values['us_per_position']:>12.2f}{values['copies']:>10.2f}")
    if json_file is not None:
        result = {"command": sys.argv, "device": name, **figures}
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
