"""The options of `train-student`: one frozen object, checked before anything is read or loaded.

Nothing heavy is imported here, so that `--help` and errors for invalid options stay instant. A run
that continues compares the values that shape the result (`run_folder.py`), so every field is plain
JSON once paths are text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.files.json_text import Json
from shards.options import OptionError, check, check_choices, option
from student_train.model.presets import PRESETS
from student_train.objective.names import LOSSES, STRATEGIES
from student_train.objective.schedules import ALPHA_SCHEDULES, LR_SCHEDULES

_FLOAT32 = 3e38  # the largest float32, about: weights are float32, and so are their factors


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of `train-student`, one field each; OptionError for invalid values.

    `tokens` and `batch_tokens` count labelled positions; `save_every` and `eval_every` are
    optimizer steps.
    """

    shards: Sequence[Path] = option(
        "Folder of a dataset that dump-logits made. Repeatable.", metavar="FOLDER"
    )
    weights: Sequence[float] = option(
        "Share of each dataset in the training data, such as 0.7,0.3. One per --shards, in the "
        "same order.",
        default=(),
        metavar="LIST",
        shown_default="in proportion to the sizes",
    )
    student: str = option(
        f"Preset ({', '.join(PRESETS)}), Hugging Face config.json, or folder of a model to "
        "train further.",
        metavar="MODEL",
    )
    teacher: str | None = option(
        "Model folder of a teacher that runs beside the student. Its exact distributions replace "
        "the stored ones. For small models.",
        default=None,
        metavar="FOLDER",
        shown_default="the distributions in --shards",
    )
    out: Path = option("Output folder of the run.", metavar="FOLDER")
    tokens: int = option(
        "Labelled positions to train on; larger values repeat the dataset.", metavar="TOKENS"
    )
    loss: str = option(
        "How to compare the student with the teacher (docs/training.md). mse needs shards of "
        "--keep top-p-k.",
        default="kld",
        choices=LOSSES,
    )
    tail: str = option(
        "What to do with the mass that --keep top-p-k leaves out. renormalize: ignore it. bucket: "
        "make it one more class. Sampled shards take only renormalize, which leaves them as "
        "they are.",
        default="renormalize",
        choices=("renormalize", "bucket"),
    )
    alpha: float = option(
        "Weight of the distillation loss; the language modelling loss has weight 1 - alpha.",
        default=0.9,
    )
    alpha_schedule: str = option(
        "How alpha changes over the run; --alpha sets the maximum.",
        default="constant",
        choices=ALPHA_SCHEDULES,
    )
    temperature: float = option(
        "Temperature of the teacher's targets. Sampled shards take only that of their dump.",
        default=1.0,
    )
    student_temperature: float = option(
        "Temperature of the student's softmax in the distillation loss, which is then multiplied "
        "by the square of this value.",
        default=1.0,
    )
    adaptive_temperature: str | None = option(
        "Strategy that sets the teacher's temperature, or the weight of distillation, for each "
        "position (docs/training.md). Needs shards of --keep top-p-k.",
        default=None,
        choices=STRATEGIES,
        shown_default="the same everywhere",
    )
    batch_tokens: int = option(
        "Labelled positions per optimizer step.", default=1 << 19, metavar="TOKENS"
    )
    micro_batch_sequences: int = option("Sequences on the device at once.", default=8)
    window_row_groups: int = option(
        "Row groups that are shuffled together. With several GPUs, a multiple of their number.",
        default=8,
    )
    learning_rate: float | None = option(
        "Maximum learning rate of the run.", default=None, shown_default="the preset's own"
    )
    lr_schedule: str = option(
        "How the learning rate changes over the run.", default="wsd", choices=LR_SCHEDULES
    )
    warmup_fraction: float = option(
        "Fraction of the run in which the learning rate rises; alpha too, with --alpha-schedule "
        "wsd.",
        default=0.02,
        metavar="FRACTION",
    )
    decay_fraction: float = option(
        "Fraction of the run in which the wsd schedules fall.", default=0.2, metavar="FRACTION"
    )
    min_learning_rate_ratio: float = option(
        "Learning rate at the end of the run, as a fraction of the maximum.",
        default=0.1,
        metavar="FRACTION",
    )
    beta1: float = option("AdamW beta1.", default=0.9)
    beta2: float = option("AdamW beta2.", default=0.95)
    weight_decay: float = option("Weight decay, matrices only.", default=0.1)
    gradient_clip: float = option(
        "Maximum norm of the gradient; 0 turns clipping off.", default=1.0, metavar="NORM"
    )
    save_every: int | None = option(
        "Steps between checkpoints.",
        default=None,
        metavar="STEPS",
        shown_default="about every ten minutes",
    )
    eval_every: int | None = option(
        "Steps between evaluations.",
        default=None,
        metavar="STEPS",
        shown_default="only at the end",
    )
    eval_shards: Path | None = option(
        "Dataset whose validation split the student is evaluated on.",
        default=None,
        metavar="FOLDER",
        shown_default="the first --shards",
    )
    eval_tasks: Sequence[str] = option(
        "Comma-separated tasks of lm-evaluation-harness to run on the finished student: names or "
        "YAML files.",
        default=(),
        metavar="LIST",
        shown_default="none",
    )
    seed: int = option(
        "Seed of the student's initial weights and of the order of sequences.", default=0
    )
    dtype: str = option(
        "Dtype in which the student runs; its weights stay in float32.",
        default="bfloat16",
        choices=("bfloat16", "float32"),
    )
    device: str = option(
        "Device to train on. auto: a GPU if the machine has one, else the CPU.",
        default="auto",
        choices=("auto", "cuda", "cpu"),
    )
    compile: bool | None = option(
        "Compile the student's blocks with torch.compile.",
        default=None,
        shown_default="on a GPU",
    )
    gradient_checkpointing: bool = option(
        "Recompute the activations of the blocks instead of keeping them.", default=False
    )

    def __post_init__(self) -> None:
        check_choices(self)
        self._check_fractions()
        self._check_sizes()
        self._check_weights()
        _check_bucket(self)
        _check_temperatures(self)

    def _check_fractions(self) -> None:
        for name in ("alpha", "warmup_fraction", "decay_fraction", "min_learning_rate_ratio"):
            value = getattr(self, name)
            check(0 <= value <= 1, name, value, "a value in [0, 1]")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check(0 <= value < 1, name, value, "a value in [0, 1)")
        falls = {"wsd", "wsd-sqrt"} & {self.lr_schedule, self.alpha_schedule}
        if falls and self.warmup_fraction + self.decay_fraction > 1:
            raise OptionError(
                "warmup_fraction",
                f" {self.warmup_fraction} and --decay-fraction {self.decay_fraction}: expected at"
                " most 1 together",
            )

    def _check_sizes(self) -> None:
        for name in ("temperature", "student_temperature"):
            value = getattr(self, name)
            check(0.01 <= value <= 100, name, value, "a value in [0.01, 100]")
        if self.learning_rate is not None:
            holds = 0 < self.learning_rate < _FLOAT32
            check(
                holds,
                "learning_rate",
                self.learning_rate,
                "a value above 0 in the range of float32",
            )
        for name in ("weight_decay", "gradient_clip"):
            value = getattr(self, name)
            check(
                0 <= value < _FLOAT32, name, value, "a value of at least 0 in the range of float32"
            )
        for name in (
            *("tokens", "batch_tokens", "micro_batch_sequences", "window_row_groups"),
            *("save_every", "eval_every"),
        ):
            value = getattr(self, name)
            if value is not None:
                check(value >= 1, name, value, "at least 1")
        check(0 <= self.seed < 1 << 63, "seed", self.seed, "a number from 0 to 2^63 - 1")

    def _check_weights(self) -> None:
        if not self.shards:
            raise OptionError("shards", ": expected at least one dataset")
        if self.weights and len(self.weights) != len(self.shards):
            raise OptionError(
                "weights",
                f": {len(self.weights)} values for {len(self.shards)} --shards; expected one for"
                " each, in the same order, or none",
            )
        for weight in self.weights:
            check(0 < weight < math.inf, "weights", weight, "values above 0")

    @property
    def reads_entries(self) -> bool:
        """Whether training needs the kept entries: not for plain language modelling."""
        return self.alpha > 0 and self.teacher is None

    @property
    def reads_tail(self) -> bool:
        """Whether training needs the mass that was not kept."""
        return self.reads_entries and self.tail == "bucket"

    def to_json(self) -> dict[str, Json]:
        """All fields as plain JSON, paths as text."""
        return {name: _to_json(value) for name, value in asdict(self).items()}


def _to_json(value: Any) -> Json:
    if isinstance(value, tuple | list):
        return [_to_json(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _check_bucket(config: TrainConfig) -> None:
    """OptionError for options for which `tail` "bucket" is not defined."""
    if config.tail != "bucket":
        return
    if config.loss == "mse":
        raise OptionError("tail", " bucket: --loss mse compares only the kept entries")
    if config.teacher is not None:
        raise OptionError("tail", " bucket: --teacher keeps every entry, so no mass is missing")
    other = None
    if config.temperature != 1:
        other = f"{config.temperature}"
    elif config.student_temperature != 1:
        other = f"--student-temperature {config.student_temperature}"
    elif config.adaptive_temperature is not None:
        other = f"those of --adaptive-temperature {config.adaptive_temperature}"
    if other is not None:
        raise OptionError(
            "tail",
            f" bucket: the mass that was not kept is known only at temperature 1, not {other}",
        )


def _check_temperatures(config: TrainConfig) -> None:
    """OptionError for temperatures that repeat each other or have no effect."""
    strategy, student = config.adaptive_temperature, config.student_temperature
    if config.loss == "mse" and student != 1:
        raise OptionError(
            "student_temperature",
            f" {student}: --loss mse compares logits; --temperature"
            f" {config.temperature / student:g} has the same effect",
        )
    if config.loss == "mse" and strategy is not None:
        raise OptionError(
            "adaptive_temperature",
            f" {strategy}: needs a softmax, but --loss mse compares logits",
        )
    if strategy == "wttm" and config.temperature <= 1:
        raise OptionError(
            "adaptive_temperature",
            f" wttm: needs a --temperature above 1, not {config.temperature}",
        )
    if strategy == "wttm" and student != 1:
        raise OptionError(
            "adaptive_temperature",
            f" wttm: needs the student at temperature 1, not --student-temperature {student}",
        )
