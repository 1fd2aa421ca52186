"""What all runs of a grid share: models, text, tokens, and the options of the commands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.design_space.text import PACKAGES

Options = dict[str, str | float]
FULL, LM = "full", "LM"

# Targets by name, as options of dump-logits. LM is the labels alone: tokens without a teacher. FULL
# is the same tokens with the teacher beside the student, which gives its whole distribution.
WITHOUT_TEACHER = (LM, FULL)
TARGETS: Mapping[str, Options] = {
    LM: {"keep": "tokens"},
    "threshold 0.05": {"keep": "threshold", "threshold": 0.05},
    FULL: {"keep": "tokens"},
    "top-p-k 0.95-100": {"keep": "top-p-k", "top-p": 0.95, "top-k": 100},
    "draws 50": {"keep": "draws", "draws": 50},
    "k = 12": {"keep": "top-p-k", "top-p": 1.0, "top-k": 12},
    "threshold 0.1": {"keep": "threshold", "threshold": 0.1},
    "draws 12": {"keep": "draws", "draws": 12},
    "top-p-k 0.95-50": {"keep": "top-p-k", "top-p": 0.95, "top-k": 50},
    "threshold 0.02": {"keep": "threshold", "threshold": 0.02},
    "threshold 0.2": {"keep": "threshold", "threshold": 0.2},
    "top-p-k 0.9-50": {"keep": "top-p-k", "top-p": 0.9, "top-k": 50},
    "k = 1": {"keep": "top-p-k", "top-p": 1.0, "top-k": 1},
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A Llama with tied embeddings, and the maximum learning rate to train it with."""

    hidden_size: int
    layers: int
    heads: int
    learning_rate: float

    def config_json(self, vocab_size: int, positions: int) -> dict[str, object]:
        """The content of a Hugging Face config.json."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.hidden_size * 11 // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": positions,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
        }


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What every run of a grid shares. Tokens are labelled positions.

    `teacher_train`, `dump` and `train` are options of the commands. All datasets have the same
    shards, so that runs with the same seed see the same sequences in the same order.
    """

    vocab_size: int
    sequence_length: int
    held_out: float  # fraction of the files of the text
    evaluation_tokens: int  # of them
    sequences_per_shard: int
    packages: Sequence[str]
    teachers: Mapping[str, Model]
    teacher_train: Options
    dataset_tokens: int
    dump: Options
    students: Mapping[str, Model]
    student_tokens: int
    train: Options

    @property
    def layout(self) -> Options:
        """The options of dump-logits that all datasets share."""
        return {
            "sequence-length": self.sequence_length,
            "sequences-per-shard": self.sequences_per_shard,
        }

    def teacher_settings(self, name: str) -> dict[str, object]:
        """Everything that decides a teacher, but for the text and the code."""
        model = self.teachers[name].config_json(self.vocab_size, 2 * self.sequence_length)
        rate = self.teachers[name].learning_rate
        return {**self.layout, **self.teacher_train, **model, "learning-rate": rate}

    def dump_options(self, target: str, data: float) -> Options:
        """The options of dump-logits for a target, but for the layout and paths."""
        options = TARGETS[target] | {"max-tokens": int(data * self.dataset_tokens)}
        return options if target in WITHOUT_TEACHER else options | self.dump

    @property
    def evaluation_options(self) -> Options:
        """The options of dump-logits for full distributions on the files that are held out."""
        everything: Options = {"keep": "top-p-k", "top-p": 1.0, "top-k": self.vocab_size}
        return everything | {"max-tokens": self.evaluation_tokens, "held-out": 0.9} | self.dump


SCALES: Mapping[str, Scale] = {
    "laptop": Scale(
        vocab_size=4096,
        sequence_length=256,
        held_out=0.04,
        evaluation_tokens=66_000,
        sequences_per_shard=64,
        packages=PACKAGES,
        teachers={
            "2M": Model(hidden_size=160, layers=4, heads=5, learning_rate=3e-3),
            "4M": Model(hidden_size=256, layers=4, heads=4, learning_rate=2e-3),
            "9M": Model(hidden_size=320, layers=6, heads=5, learning_rate=2e-3),
        },
        teacher_train={
            "alpha": 0.0,
            "dtype": "bfloat16",
            "tokens": 5_000_000,
            "batch-tokens": 4096,
        },
        students={
            "0.5M": Model(hidden_size=80, layers=2, heads=5, learning_rate=3e-3),
            "1M": Model(hidden_size=128, layers=3, heads=4, learning_rate=3e-3),
            "2M": Model(hidden_size=160, layers=5, heads=5, learning_rate=3e-3),
        },
        dataset_tokens=1_600_000,
        dump={"engine": "vllm"},
        student_tokens=1_500_000,
        train={"dtype": "float32", "batch-tokens": 2048},
    ),
    # Seconds: shows that every step works, nothing else.
    "smoke": Scale(
        vocab_size=300,
        sequence_length=32,
        held_out=0.2,
        evaluation_tokens=600,
        sequences_per_shard=64,
        packages=("asyncio", "email", "logging", "multiprocessing", "unittest"),
        teachers={"4M": Model(hidden_size=64, layers=1, heads=2, learning_rate=3e-2)},
        teacher_train={
            "alpha": 0.0,
            "dtype": "float32",
            "tokens": 16_384,
            "batch-tokens": 512,
        },
        students={"1M": Model(hidden_size=16, layers=1, heads=2, learning_rate=1e-2)},
        dataset_tokens=4096,
        dump={"engine": "transformers", "dtype": "float32"},
        student_tokens=2048,
        train={"dtype": "float32", "batch-tokens": 512},
    ),
}


def digest(content: object) -> str:
    """12 digits that name a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
