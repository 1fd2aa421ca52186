"""A training run that is killed and continued, beside one that is left alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.check import Figures, expect
from benchmarks.gpu.commands import kill_when, run
from benchmarks.synthetic_shards import make_shards


class Scale(NamedTuple):
    """Sequences, and steps: of the whole run, between checkpoints, and before the kill."""

    sequence_length: int
    vocab_size: int
    steps: int
    save_every: int
    killed_after: int


FULL = Scale(1024, 32_768, 200, 10, 40)
SMALL = Scale(32, 1024, 40, 4, 8)
BATCH_SEQUENCES = 8

# Relative differences of losses. Other sequences would change a loss by about 1e-2. A GPU adds up
# in an order of its own, and what that changes grows with the steps.
SOON, SOON_STEPS, LATER = 1e-3, 10, 2e-2


def resume(folder: Path, small: bool) -> Figures:
    """The largest relative differences of losses, soon after the kill and later."""
    scale = SMALL if small else FULL
    dataset = make_shards(
        folder / "dataset",
        num_sequences=BATCH_SEQUENCES * scale.steps // 2,  # two epochs
        sequence_length=scale.sequence_length,
        vocab_size=scale.vocab_size,
        entries=12,
    )
    batch_tokens = BATCH_SEQUENCES * scale.sequence_length
    words = [
        *("train-student", "--shards", str(dataset.path), "--student", "demo"),
        *("--tokens", str(scale.steps * batch_tokens), "--batch-tokens", str(batch_tokens)),
        *("--save-every", str(scale.save_every), "--no-compile", "--out"),
    ]
    whole, killed = folder / "whole", folder / "killed"
    run(*words, str(whole))
    left = kill_when(partial(_has_saved, killed, scale.killed_after), *words, str(killed))
    expect(not left, f"processes {left} outlive a killed train-student")
    reached = len(_losses(killed))
    expect(reached < scale.steps, "the run had ended before it was killed")
    run(*words, str(killed))
    found, expected = _losses(killed), _losses(whole)
    steps = len(found), len(expected)
    expect(steps == (scale.steps, scale.steps), f"{steps} steps, expected {scale.steps}")
    differences = [abs(a / b - 1) for a, b in zip(found, expected, strict=True)]
    soon = max(differences[: reached + SOON_STEPS])
    later = max(differences)
    expect(soon < SOON, f"a loss differs by {soon:.1e} soon after step {reached}")
    expect(later < LATER, f"a loss differs by {later:.1e}")
    files = [(path / "model" / "model.safetensors").read_bytes() for path in (whole, killed)]
    return {
        "killed_after_step": reached,
        "largest_difference_soon": soon,
        "largest_difference": later,
        "same_bytes": files[0] == files[1],
        "losses": [expected[0], expected[-1]],
    }


def _has_saved(out: Path, step: int) -> bool:
    return (out / "checkpoints" / f"step-{step:08}").exists()


def _losses(out: Path) -> list[float]:
    """Of all steps in the metrics, in order; a last line that was cut off is left out."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [float(json.loads(line)["loss"]) for line in lines]
