"""`kill -9` of a real training process at its worst moments, then the same command again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.tiny_dataset import SEQUENCE_LENGTH, make_dataset

# One thread: a bit-identical result is promised for the same number of threads only.
PROGRAM = """
import sys, json
from pathlib import Path
from student_train.config import TrainConfig
from student_train.train import run

shards, student, out = sys.argv[1:]
run(TrainConfig(shards=Path(shards), student=student, out=Path(out), tokens=160 * 128,
    batch_tokens=128, micro_batch_sequences=3, learning_rate=1e-2, dtype="float32", save_every=40,
    eval_every=30))
"""
ROOT = Path(__file__).parent.parent
TIMEOUT_S = 300
KINDS = ("train", "validation")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A dataset and a student."""
    folder = tmp_path_factory.mktemp("kill")
    shards = make_dataset(folder / "dataset", train=50, validation=6)
    LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQUENCE_LENGTH,
    ).save_pretrained(folder)
    return str(shards), str((folder / "config.json").rename(folder / "student.json"))


def start(arguments: tuple[str, str], out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments, str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )


def finish(arguments: tuple[str, str], out: Path) -> None:
    process = start(arguments, out)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors.decode()


def kill_when(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """Kill a process, which must still be running, as soon as something is true."""
    deadline = time.monotonic() + TIMEOUT_S
    while not reached():
        assert process.poll() is None, "it ended too early to be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    assert process.returncode == -9


def num_lines(out: Path) -> int:
    file = out / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def test_a_killed_run_ends_like_one_that_was_never_killed(
    arguments: tuple[str, str], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(arguments, whole)
    checkpoints = killed / "checkpoints"

    # Before the first checkpoint: from the beginning again.
    kill_when(start(arguments, killed), lambda: num_lines(killed) > 20)
    # While a checkpoint is written.
    kill_when(start(arguments, killed), lambda: any(checkpoints.glob(".step-*.tmp")))
    # Some steps after one.
    kill_when(
        start(arguments, killed),
        lambda: any(checkpoints.glob("step-*80")) and num_lines(killed) > 95,
    )
    finish(arguments, killed)

    for name in ("model/model.safetensors", "metrics.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    found = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    steps = {kind: [line["step"] for line in found if line["kind"] == kind] for kind in KINDS}
    assert steps == {"train": list(range(1, 161)), "validation": [30, 60, 90, 120, 150, 160]}
    assert not list(killed.rglob("*.tmp"))
