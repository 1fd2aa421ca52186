"""What all runs of a grid share: models, text, tokens, and the options of the commands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.design_space.text import PACKAGES
from student_train.config import TrainConfig

Options = dict[str, str | float]
FULL, LM = "full", "LM"

# Targets by name, as options of dump-logits. LM is the labels alone: tokens without a teacher. FULL
# is the same tokens with the teacher beside the student, which gives its whole distribution.
WITHOUT_TEACHER = (LM, FULL)
# Whose logits: the finished teacher's, or those that it saved in its own training, from the first
# step on or in the last steps.
OFFLINE, EARLY, LATE = "offline", "early", "late"
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
            "initializer_range": 0.06,  # the usual 0.02 is for models ten times as wide
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

    def teacher_options(self, logits: str = OFFLINE) -> Options:
        """The options of train-student for a teacher, or for one that saves its own logits.

        A late one is the teacher itself, and saves the last of its steps. An early one stops where
        it has saved enough, and its learning rate is that of the teacher up to there.
        """
        if logits == OFFLINE:
            return dict(self.teacher_train)
        tokens, batch = (int(self.teacher_train[key]) for key in ("tokens", "batch-tokens"))
        steps = -(-self.dataset_tokens // batch)
        if logits == LATE:
            return self.teacher_train | {"save-logits-from": -(-tokens // batch) - steps + 1}
        warmup = TrainConfig.warmup_fraction * tokens / self.dataset_tokens
        stop: Options = {"tokens": self.dataset_tokens, "lr-schedule": "constant"}
        return self.teacher_train | stop | {"warmup-fraction": warmup}

    def teacher_settings(self, name: str, logits: str = OFFLINE) -> dict[str, object]:
        """Everything that decides a teacher, but for the text and the code."""
        model = self.teachers[name].config_json(self.vocab_size, 2 * self.sequence_length)
        options = self.teacher_options(logits)
        rate = self.teachers[name].learning_rate
        return {**self.layout, **options, **model, "learning-rate": rate}

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
        vocab_size=2048,
        sequence_length=256,
        held_out=0.04,
        evaluation_tokens=66_000,
        sequences_per_shard=64,
        packages=PACKAGES,
        teachers={
            "1.6M": Model(hidden_size=160, layers=4, heads=5, learning_rate=1.5e-3),
            "3.7M": Model(hidden_size=256, layers=4, heads=4, learning_rate=1.5e-3),
            "8.2M": Model(hidden_size=320, layers=6, heads=5, learning_rate=1.5e-3),
        },
        teacher_train={
            "alpha": 0.0,
            "dtype": "bfloat16",
            "tokens": 4_000_000,
            "batch-tokens": 2048,
        },
        students={
            "0.3M": Model(hidden_size=80, layers=2, heads=5, learning_rate=2e-3),
            "0.9M": Model(hidden_size=128, layers=3, heads=4, learning_rate=2e-3),
            "1.9M": Model(hidden_size=160, layers=5, heads=5, learning_rate=1.5e-3),
        },
        dataset_tokens=640_000,
        dump={"engine": "vllm"},
        student_tokens=600_000,
        train={"dtype": "float32", "batch-tokens": 1024},
    ),
    # Seconds: shows that every step works, nothing else.
    "smoke": Scale(
        vocab_size=300,
        sequence_length=32,
        held_out=0.2,
        evaluation_tokens=600,
        sequences_per_shard=64,
        packages=("asyncio", "email", "logging", "multiprocessing", "unittest"),
        teachers={
            name: Model(hidden_size=size, layers=1, heads=2, learning_rate=3e-2)
            for name, size in {"1.6M": 32, "3.7M": 64, "8.2M": 96}.items()
        },
        teacher_train={
            "alpha": 0.0,
            "dtype": "float32",
            "tokens": 16_384,
            "batch-tokens": 512,
        },
        students={
            name: Model(hidden_size=size, layers=1, heads=2, learning_rate=1e-2)
            for name, size in {"0.3M": 8, "0.9M": 16, "1.9M": 24}.items()
        },
        dataset_tokens=4096,
        dump={"engine": "transformers", "dtype": "float32"},
        student_tokens=2048,
        train={"dtype": "float32", "batch-tokens": 512},
    ),
}


def digest(content: object) -> str:
    """12 digits that name a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
