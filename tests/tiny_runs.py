"""Short runs of a very small student, and what they left in their folders."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from transformers import LlamaConfig

from student_train.config import TrainConfig
from tests.tiny_dataset import SEQUENCE_LENGTH

STEP_SEQUENCES = 4


def write_student(folder: Path) -> str:
    """A config file of a very small Llama."""
    LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    ).save_pretrained(folder)
    return str((folder / "config.json").rename(folder / "student.json"))


def make_config(shards: Path, student: str, out: Path, **changes: Any) -> TrainConfig:
    """Six steps of `STEP_SEQUENCES`, unless changed."""
    config = TrainConfig(
        shards=[shards],
        student=student,
        out=out,
        tokens=6 * STEP_SEQUENCES * SEQUENCE_LENGTH,
        batch_tokens=STEP_SEQUENCES * SEQUENCE_LENGTH,
        micro_batch_sequences=3,
        learning_rate=1e-2,
        dtype="float32",
        device="cpu",  # where a run that continues is the same bit for bit
    )
    return replace(config, **changes)


def lines(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind in the metrics of a run."""
    content = (out / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, content) if line["kind"] == kind]


def saved_steps(out: Path) -> list[int]:
    """The steps whose checkpoints are there."""
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    return [int(name.removeprefix("step-")) for name in names]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Of the student that a run made."""
    return load_file(out / "model" / "model.safetensors")


def assert_same_run(found: Path, expected: Path) -> None:
    """Weights and metrics are the same, bit for bit."""
    for name, weight in weights(expected).items():
        assert torch.equal(weights(found)[name], weight), name
    assert (found / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()


def checkpoint_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's folder."""
    reader = FileSystemReader(path / "weights")
    tensors = {
        name: torch.empty(stored.size)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*assuming the intent is to load")
        read_state(tensors, storage_reader=reader, no_dist=True)
    return tensors
