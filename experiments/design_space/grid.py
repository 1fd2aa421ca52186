"""The grid as data: what every run shares (`Scale`), the cells, and the order they run in.

A cell is one student. Its `question` says what it was added for; another question may read its row
too. A row of the results belongs to a cell by the hash of the cell's settings, so a changed setting
makes a new row and leaves the old one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from experiments.design_space.text import PACKAGES

Options = dict[str, str | float]
FULL, LM = "full", "LM"
SEEDS = (0, 1, 2)

# Targets by name, as options of dump-logits. LM is the labels alone: tokens without a teacher.
TARGETS: Mapping[str, Options] = {
    FULL: {"keep": "top-p-k", "top-p": 1.0},  # top-k: the vocabulary
    LM: {"keep": "tokens"},
    "threshold 0.05": {"keep": "threshold", "threshold": 0.05},
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
BASE_TEACHER, BASE_STUDENT = "4M", "1M"
SAMPLED, TRUNCATED = "threshold 0.05", "top-p-k 0.95-100"  # what the other questions vary


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
    held_out: float
    sequences_per_shard: int
    packages: Sequence[str]
    teachers: Mapping[str, Model]
    teacher_train: Options
    dataset_tokens: int  # of both splits
    dump: Options
    students: Mapping[str, Model]
    student_tokens: int
    train: Options

    @property
    def layout(self) -> Options:
        """The options of dump-logits that all datasets share."""
        return {
            "sequence-length": self.sequence_length,
            "held-out": self.held_out,
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
        options |= {"top-k": self.vocab_size} if target == FULL else {}
        return options if target == LM else options | self.dump

    def train_options(self, cell: Cell) -> Options:
        """The options of train-student for a cell, but for student, seed and paths."""
        tokens, alpha = int(cell.tokens * self.student_tokens), float(cell.target != LM)
        return self.train | {"tokens": tokens, "alpha": alpha} | cell.options


SCALES: Mapping[str, Scale] = {
    "laptop": Scale(
        vocab_size=4096,
        sequence_length=256,
        held_out=0.04,
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
            "batch-tokens": 8192,
        },
        students={
            "0.5M": Model(hidden_size=80, layers=2, heads=5, learning_rate=3e-3),
            "1M": Model(hidden_size=128, layers=3, heads=4, learning_rate=3e-3),
            "2M": Model(hidden_size=160, layers=5, heads=5, learning_rate=3e-3),
        },
        dataset_tokens=1_600_000,
        dump={"engine": "vllm"},
        student_tokens=1_500_000,
        train={"dtype": "float32", "batch-tokens": 4096},
    ),
    # Seconds: shows that every step works, nothing else.
    "smoke": Scale(
        vocab_size=300,
        sequence_length=32,
        held_out=0.2,
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


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One student. The factors multiply the scale's tokens.

    `data` is the size of the dataset and `tokens` how long to train: with 0.25 and 1 the student
    sees its data four times.
    """

    question: int
    target: str
    options: Options = field(default_factory=dict)
    student: str = BASE_STUDENT
    teacher: str = BASE_TEACHER
    data: float = 1
    tokens: float = 1

    @property
    def name(self) -> str:
        """What differs from a run of question 1."""
        changed = [f"{key} {value}" for key, value in self.options.items() if key != "alpha"]
        alpha = self.options.get("alpha")
        changed += [] if alpha is None else [f"alpha {alpha}"]
        changed += [f"student {self.student}"] if self.student != BASE_STUDENT else []
        changed += [f"teacher {self.teacher}"] if self.teacher != BASE_TEACHER else []
        changed += [f"{self.data:g} of the data"] if self.data != 1 else []
        changed += [f"{self.tokens:g} of the tokens"] if self.tokens != 1 else []
        return ", ".join([self.target, *changed])

    def settings(self, scale: Scale) -> dict[str, object]:
        """Everything that decides the result, but for text, seed and code."""
        return {
            "vocab_size": scale.vocab_size,
            "teacher": None if self.target == LM else scale.teacher_settings(self.teacher),
            "dump": scale.layout | scale.dump_options(self.target, self.data),
            "student": asdict(scale.students[self.student]),
            "train": scale.train_options(self),
        }

    def hash(self, scale: Scale) -> str:
        """The identity of the settings in the results."""
        return digest(self.settings(scale))


def digest(content: object) -> str:
    """12 digits that name a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _targets() -> Iterator[Cell]:
    for target in TARGETS:
        yield Cell(question=1, target=target)


def _losses() -> Iterator[Cell]:
    # mse leaves all other logits free, so losses and temperatures keep a tenth of the labels' loss.
    for target in (TRUNCATED, "k = 12", "top-p-k 0.95-50"):
        yield Cell(question=2, target=target, options={"tail": "bucket"})
    yield Cell(question=2, target=TRUNCATED, options={"alpha": 0.9})
    for loss in ("mse", "nll"):
        yield Cell(question=2, target=TRUNCATED, options={"loss": loss, "alpha": 0.9})


def _alphas() -> Iterator[Cell]:
    for alpha in (0.9, 0.5, 0.7, 0.3, 0.1):
        for target in (SAMPLED, TRUNCATED):
            yield Cell(question=3, target=target, options={"alpha": alpha})
    for rate in ("wsd", "cosine"):
        if rate != "wsd":
            yield Cell(question=3, target=LM, options={"lr-schedule": rate})
            yield Cell(question=3, target=SAMPLED, options={"lr-schedule": rate})
        for schedule in ("wsd", "linear-decrease", "linear-increase", "period"):
            options: Options = {"alpha-schedule": schedule}
            options |= {"lr-schedule": rate} if rate != "wsd" else {}
            yield Cell(question=3, target=SAMPLED, options=options)


def _temperatures() -> Iterator[Cell]:
    for temperature in (0.5, 2, 0.2, 5, 10):
        options: Options = {"temperature": temperature}
        yield Cell(question=4, target=TRUNCATED, options=options | {"alpha": 0.9})
    for strategy in ("adakd-h", "adakd-sd", "normkd", "wttm"):
        options = {"adaptive-temperature": strategy}
        options |= {"temperature": 2} if strategy == "wttm" else {}  # it needs one above 1
        yield Cell(question=4, target=TRUNCATED, options=options | {"alpha": 0.9})


def _sizes() -> Iterator[Cell]:
    for student in ("0.5M", "2M"):
        for target in (LM, SAMPLED):
            yield Cell(question=5, target=target, student=student)
    for teacher in ("2M", "9M"):
        yield Cell(question=5, target=SAMPLED, teacher=teacher)


def _corpora() -> Iterator[Cell]:
    for data, tokens in ((0.25, 1.0), (0.5, 0.5), (2.0, 2.0)):
        for target in (LM, SAMPLED):
            yield Cell(question=6, target=target, data=data, tokens=tokens)


def cells() -> list[Cell]:
    """All cells, question by question, the most informative of each first."""
    parts = (_targets, _losses, _alphas, _temperatures, _sizes, _corpora)
    return [cell for part in parts for cell in part()]


QUESTIONS = (1, 2, 3, 4, 5, 6)


def runs(questions: Sequence[int] = ()) -> Iterator[tuple[Cell, int]]:
    """Cells with seeds in the order to run them: a question is done seed by seed.

    No questions: all.
    """
    for question in questions or QUESTIONS:
        for seed in SEEDS:
            yield from ((cell, seed) for cell in cells() if cell.question == question)


def labels_alone(cell: Cell) -> Cell:
    """The cell that a gain is measured against: the same run without a teacher."""
    rate = {key: value for key, value in cell.options.items() if key == "lr-schedule"}
    return replace(cell, target=LM, options=rate, teacher=BASE_TEACHER)


def shown(question: int) -> list[Cell]:
    """The cells of a question as its table shows them, with those of others to compare with."""
    own = [cell for cell in cells() if cell.question == question]
    plain = Cell(question=1, target=LM)
    sampled, truncated = (Cell(question=1, target=name) for name in (SAMPLED, TRUNCATED))
    if question == 2:
        others = [
            Cell(question=1, target=name) for name in (TRUNCATED, "k = 12", "top-p-k 0.95-50")
        ]
        return [plain, *others, *own]
    if question == 4:
        return [
            plain,
            Cell(question=2, target=TRUNCATED, options={"alpha": 0.9}),
            *own,
        ]
    if question == 1:
        return own
    return [plain, sampled, *([truncated] if question == 3 else []), *own]
