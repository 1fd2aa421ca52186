"""Dumps of a tiny teacher by the engine `vllm`, against dense float32 logits of transformers.

The teacher's distributions are sharp and varied: a row in the wrong place is off by several nats.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.check import Figures, NotHereError, expect, find_device
from benchmarks.gpu.commands import kill_when, run
from shards.rows import Row
from tests.tiny_teacher import (
    STEP,
    TOKENIZER_LENGTH,
    all_rows,
    dense_logprobs,
    dump_command,
    make_tiny_teacher,
    write_corpus,
)

LENGTH = 300
EAGER = ("--engine-arg", "enforce_eager=true", "--engine-arg", "gpu_memory_utilization=0.3")
CHUNKS = ("--engine-arg", "max_num_batched_tokens=96", "--engine-arg", "max_num_seqs=8")
FLOAT32 = ("--dtype", "float32")
# Largest errors of a kept entry or a label beyond half a step of the grid, nats.
FLOAT32_ERROR, BFLOAT16_ERROR = 0.05, 0.5
SHARDS_BEFORE_THE_KILL = 3
ROWS_COMPARED = 20


def chunks(folder: Path, small: bool) -> Figures:
    """Prompts of three chunks and more, many at once."""
    return _dump(folder, FLOAT32_ERROR, *FLOAT32, *EAGER, *CHUNKS)


def defaults(folder: Path, small: bool) -> Figures:
    """What a user gets: bfloat16 with a float32 head, on a GPU compiled and with CUDA graphs."""
    return _dump(folder, BFLOAT16_ERROR)


def tensor_parallel(folder: Path, small: bool) -> Figures:
    """Two GPUs share the teacher."""
    import torch

    if torch.cuda.device_count() < 2:
        raise NotHereError("needs two GPUs")
    return _dump(folder, FLOAT32_ERROR, *FLOAT32, *EAGER, *CHUNKS, "--tensor-parallel", "2")


def kill(folder: Path, small: bool) -> Figures:
    """A killed dump leaves no process and no lock, and goes on with what it had."""
    teacher = make_tiny_teacher(folder / "teacher")
    corpus = write_corpus(folder / "corpus.jsonl", num_documents=400 if small else 4000)
    out = folder / "out"
    words = dump_command(teacher, corpus, out, *FLOAT32, *EAGER)[2:]

    def complete() -> list[Path]:
        found = (out / "train").glob("shard-*.parquet")
        return [path for path in found if path.with_suffix(".json").exists()]

    left = kill_when(lambda: len(complete()) >= SHARDS_BEFORE_THE_KILL, *words)
    expect(not left, f"processes {left} outlive a killed dump-logits")
    kept = {path: path.read_bytes() for path in complete()}
    run(*words)
    expect(len(complete()) > len(kept), "the dump had ended before it was killed")
    for path, content in kept.items():
        expect(path.read_bytes() == content, f"{path.name} was written again")
    run("inspect-shards", str(out), "--verify")
    rows = list(all_rows(out).values())
    some = rows[:: max(1, len(rows) // ROWS_COMPARED)]
    return {
        "shards_before_the_kill": len(kept),
        "shards": len(complete()),
        **_compare(teacher, some, FLOAT32_ERROR),
    }


def _dump(folder: Path, limit: float, *options: str) -> Figures:
    """Errors of a dump with these options, which is verified first."""
    teacher = make_tiny_teacher(folder / "teacher", max_position_embeddings=2 * LENGTH)
    corpus = write_corpus(folder / "corpus.jsonl", num_documents=90)
    out = folder / "out"
    length = ("--sequence-length", str(LENGTH))
    run(*dump_command(teacher, corpus, out, *length, *options)[2:])
    run("inspect-shards", str(out), "--verify")
    return {"device": find_device().type, **_compare(teacher, all_rows(out).values(), limit)}


def _compare(teacher: Path, rows: Iterable[Row], limit: float) -> Figures:
    """The errors of all positions; CheckFailedError if one is beyond the limit."""
    errors, shifted = [], []
    for row in rows:
        exact = dense_logprobs(teacher, row.tokens, TOKENIZER_LENGTH)
        errors.append(_errors(row, exact))
        shifted.append(_errors(row, np.roll(exact, 1, axis=0)))
    worst = float(np.concatenate(errors).max())
    expect(worst <= limit, f"off by {worst:.2f} nats, expected at most {limit}")
    typical = float(np.median(np.concatenate(shifted)))
    expect(typical > 6 * BFLOAT16_ERROR, f"rows one place off differ by {typical:.2f} nats only")
    return {
        "positions": sum(map(len, errors)),
        "largest_error": worst,
        "mean_error": float(np.concatenate(errors).mean()),
        "median_error_one_place_off": typical,
    }


def _errors(row: Row, exact: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Of each position [T], the largest of its kept entries and its label, nats."""
    assert row.counts is not None
    assert row.ids is not None
    assert row.logprobs is not None
    assert row.label_logprobs is not None
    places = np.repeat(np.arange(len(row.counts)), row.counts)
    largest = np.abs(row.label_logprobs - exact[np.arange(len(exact)), row.tokens[1:]])
    np.maximum.at(largest, places, np.abs(row.logprobs - exact[places, row.ids]))
    beyond: npt.NDArray[Any] = np.maximum(largest - STEP / 2, 0.0)
    return beyond
