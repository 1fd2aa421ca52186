"""What `train-student` was asked for: one frozen object, checked before anything is read or loaded.

Nothing heavy is imported here, so that `--help` and a refusal of bad options stay instant. The
values that shape the result are compared when a run is continued (`checkpoint.py`), so every field
is plain JSON once paths are text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.errors import InputError
from shards.identity import Json
from student_train.schedules import ALPHA_SCHEDULES, LR_SCHEDULES


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of `train-student`, one field each; raises InputError for values nobody can mean.

    `student` is a preset, a Hugging Face config.json or a model folder. `tokens` and `batch_tokens`
    count labelled positions; more `tokens` than the dataset has are further epochs. A learning rate
    of None is the preset's own. `save_every` and `eval_every` are optimizer steps; None saves every
    ten minutes or so (`saving.py`) and evaluates only at the end, which is saved and evaluated
    always. `shards` are datasets of one tokenizer, `weights` the share of the batch lines that
    each of them gives, at any scale; none: by size. `eval_shards` None evaluates on the validation
    split of the first of `shards`. `eval_tasks` are names or YAML files of lm-evaluation-harness.
    """

    shards: Sequence[Path]
    student: str
    out: Path
    tokens: int
    weights: Sequence[float] = ()
    loss: str = "kld"
    tail: str = "renormalize"
    alpha: float = 0.9
    alpha_schedule: str = "constant"
    temperature: float = 1.0
    student_temperature: float = 1.0
    adaptive_temperature: str | None = None
    batch_tokens: int = 1 << 19
    micro_batch_sequences: int = 8
    learning_rate: float | None = None
    lr_schedule: str = "wsd"
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.2
    min_learning_rate_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    gradient_clip: float | None = 1.0
    save_every: int | None = None
    eval_every: int | None = None
    eval_shards: Path | None = None
    eval_tasks: Sequence[str] = ()
    seed: int = 0
    dtype: str = "bfloat16"
    compile: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_weights()
        _check_bucket(self)
        _check_temperatures(self)

    def _check_choices(self) -> None:
        _one_of("--loss", self.loss, ("kld", "nll", "mse"))
        _one_of("--tail", self.tail, ("renormalize", "bucket"))
        _one_of("--alpha-schedule", self.alpha_schedule, ALPHA_SCHEDULES)
        if self.adaptive_temperature is not None:
            _one_of(
                "--adaptive-temperature",
                self.adaptive_temperature,
                ("normkd", "wttm", "adakd-sd", "adakd-h"),
            )
        _one_of("--lr-schedule", self.lr_schedule, LR_SCHEDULES)
        _one_of("--dtype", self.dtype, ("bfloat16", "float32"))

    def _check_numbers(self) -> None:
        for option, fraction in (
            ("--alpha", self.alpha),
            ("--warmup-fraction", self.warmup_fraction),
            ("--decay-fraction", self.decay_fraction),
            ("--min-learning-rate-ratio", self.min_learning_rate_ratio),
        ):
            _require(0 <= fraction <= 1, option, fraction, "a value in [0, 1]")
        for option, beta in (("--beta1", self.beta1), ("--beta2", self.beta2)):
            _require(0 <= beta < 1, option, beta, "a value in [0, 1)")
        falls = {"wsd", "wsd-sqrt"} & {self.lr_schedule, self.alpha_schedule}
        if falls and self.warmup_fraction + self.decay_fraction > 1:
            raise InputError(
                f"--warmup-fraction {self.warmup_fraction} and --decay-fraction"
                f" {self.decay_fraction}: expected at most 1 together"
            )
        for option, positive in (
            ("--temperature", self.temperature),
            ("--student-temperature", self.student_temperature),
            ("--learning-rate", self.learning_rate),
            ("--gradient-clip", self.gradient_clip),
        ):
            if positive is not None:
                _require(0 < positive < float("inf"), option, positive, "a value above 0")
        _require(
            0 <= self.weight_decay < float("inf"), "--weight-decay", self.weight_decay, "0 or more"
        )
        for option, count in (
            ("--tokens", self.tokens),
            ("--batch-tokens", self.batch_tokens),
            ("--micro-batch-sequences", self.micro_batch_sequences),
            ("--save-every", self.save_every),
            ("--eval-every", self.eval_every),
        ):
            if count is not None:
                _require(count >= 1, option, count, "at least 1")
        _require(0 <= self.seed < 1 << 63, "--seed", self.seed, "a number from 0 to 2^63 - 1")

    def _check_weights(self) -> None:
        if not self.shards:
            raise InputError("--shards: expected at least one dataset")
        if self.weights and len(self.weights) != len(self.shards):
            raise InputError(
                f"--weights: {len(self.weights)} of them for {len(self.shards)} --shards; expected"
                " one for each, in their order, or none"
            )
        for weight in self.weights:
            _require(0 < weight < float("inf"), "--weights", weight, "values above 0")

    @property
    def reads_entries(self) -> bool:
        """Whether training needs the teacher's kept entries: not for plain language modelling."""
        return self.alpha > 0

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
    """InputError for what `--tail bucket` has no definition for."""
    if config.tail != "bucket":
        return
    if config.loss == "mse":
        raise InputError("--tail bucket: --loss mse compares the kept entries alone")
    other = None
    if config.temperature != 1:
        other = f"{config.temperature}"
    elif config.student_temperature != 1:
        other = f"--student-temperature {config.student_temperature}"
    elif config.adaptive_temperature is not None:
        other = f"those of --adaptive-temperature {config.adaptive_temperature}"
    if other is not None:
        raise InputError(
            f"--tail bucket: what was not kept is known at temperature 1, not at {other}"
        )


def _check_temperatures(config: TrainConfig) -> None:
    """InputError for temperatures that say the same twice, or nothing."""
    strategy, student = config.adaptive_temperature, config.student_temperature
    if config.loss == "mse" and student != 1:
        raise InputError(
            f"--student-temperature {student}: --loss mse compares logits, where that is the same"
            f" as --temperature {config.temperature / student:g}"
        )
    if config.loss == "mse" and strategy is not None:
        raise InputError(
            f"--adaptive-temperature {strategy}: is of a softmax, and --loss mse compares logits"
        )
    if strategy == "wttm" and config.temperature <= 1:
        raise InputError(
            f"--adaptive-temperature wttm: its weights need a --temperature above 1, not"
            f" {config.temperature}"
        )
    if strategy == "wttm" and student != 1:
        raise InputError(
            f"--adaptive-temperature wttm: its student is at temperature 1, not at"
            f" --student-temperature {student}"
        )


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{option} {value}: expected {', '.join(allowed[:-1])} or {allowed[-1]}")


def _require(holds: bool, option: str, value: float, expected: str) -> None:
    # A NaN compares false with everything and so is refused as well.
    if not holds:
        raise InputError(f"{option} {value}: expected {expected}")
