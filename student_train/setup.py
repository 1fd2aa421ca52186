"""Check that options, datasets and the evaluation dataset fit together before a run begins."""

from __future__ import annotations

import logging

from shards.dataset import Dataset, Split
from shards.errors import IdentityMismatchError, InputError
from shards.keep import Keep
from shards.schema import ENTROPIES, SEGMENTS
from shards.spec import VALIDATION
from student_train.config import TrainConfig
from student_train.data.batches import TAIL_COLUMNS, TARGET_COLUMNS, TOKEN_COLUMNS
from student_train.evaluation.evaluate import check_counted
from student_train.objective.distillation import Objective
from student_train.objective.schedules import Alpha, LearningRate, learning_rate

logger = logging.getLogger(__name__)


def open_datasets(config: TrainConfig) -> list[Dataset]:
    """The datasets that are trained on. InputError or IdentityMismatchError if they do not mix."""
    datasets = [Dataset.open(path) for path in config.shards]
    first = datasets[0]
    for number, other in enumerate(datasets[1:], start=1):
        if any(other.path.samefile(before.path) for before in datasets[:number]):
            raise InputError(f"--shards {other.path}: given twice; --weights sets its share")
        _check_mixes(config, other, first)
    for dataset in datasets:
        check_objective(config, dataset)
    return datasets


def _check_mixes(config: TrainConfig, other: Dataset, first: Dataset) -> None:
    """InputError or IdentityMismatchError for a dataset that cannot be mixed into the first."""
    _check_tokenizers("--shards", other, first)
    length, expected = (d.spec.sequence_length for d in (other, first))
    if length != expected:
        raise InputError(
            f"--shards {other.path}: has sequences of {length} tokens, but {first.path} has"
            f" {expected}; expected the same --sequence-length"
        )
    keep, expected_keep = other.spec.keep, first.spec.keep
    if config.reads_entries and keep.is_sampled != expected_keep.is_sampled:
        raise InputError(
            f"--shards {other.path}: cannot mix its entries (--keep {keep.method}) with those of"
            f" {first.path} (--keep {expected_keep.method}): one stores probabilities, the other"
            " sampled weights"
        )
    if reads_entropies(config, first) != reads_entropies(config, other):
        raise InputError(
            f"--adaptive-temperature {config.adaptive_temperature}: only one of {first.path} and"
            f" {other.path} stores the teacher's entropies"
        )
    documents = first.spec.documents, other.spec.documents
    for name in ("bos", "bos_token_id", "eos_token_id"):
        here, there = (getattr(part, name) for part in documents)
        if here != there:
            logger.warning(
                "warning: %s: its %s is %s, but the student gets that of %s, %s",
                other.path, name, there, first.path, here,
            )  # fmt: skip


def reads_entropies(config: TrainConfig, dataset: Dataset) -> bool:
    """Whether training takes the temperature of a position from its stored entropy."""
    return (
        config.reads_entries
        and config.adaptive_temperature == "adakd-h"
        and ENTROPIES in dataset.spec.columns
    )


def columns_to_read(config: TrainConfig, *, segments: bool = False) -> tuple[str, ...]:
    """The columns of a dataset that the objective needs, and `segments` if they are wanted."""
    if segments:
        return (*columns_to_read(config), SEGMENTS)
    if config.reads_tail:
        return TAIL_COLUMNS
    if not config.reads_entries:
        return TOKEN_COLUMNS
    if config.adaptive_temperature == "adakd-h":
        return (*TARGET_COLUMNS, ENTROPIES)
    return TARGET_COLUMNS


def plan_steps(config: TrainConfig, dataset: Dataset) -> tuple[int, int]:
    """Sequences of a step, and the number of steps for at least `config.tokens` positions.

    Every sequence counts as full: the few that are short, or have positions that do not count,
    must not change the number of steps. InputError if a step would hold no sequence.
    """
    length = dataset.spec.sequence_length
    step_sequences = config.batch_tokens // length
    if not step_sequences:
        raise InputError(
            f"--batch-tokens {config.batch_tokens}: expected at least one sequence of"
            f" {dataset.path}, {length} labelled positions"
        )
    step_tokens = step_sequences * length
    if step_tokens != config.batch_tokens:
        logger.info(
            "--batch-tokens %d: rounded down to %d, %d sequences of %d",
            config.batch_tokens,
            step_tokens,
            step_sequences,
            length,
        )
    return step_sequences, -(-config.tokens // step_tokens)


def plan_schedules(config: TrainConfig, num_steps: int) -> tuple[LearningRate, Alpha]:
    """Learning rate and alpha of every step."""
    rates = learning_rate(
        config.lr_schedule,
        peak=config.learning_rate or 0.0,
        num_steps=num_steps,
        warmup_fraction=config.warmup_fraction,
        decay_fraction=config.decay_fraction,
        floor=config.min_learning_rate_ratio,
    )
    alphas = Alpha(
        kind=config.alpha_schedule,
        peak=config.alpha,
        num_steps=num_steps,
        warmup_fraction=config.warmup_fraction,
        decay_fraction=config.decay_fraction,
    )
    return rates, alphas


def make_objective(config: TrainConfig, split: Split) -> Objective:
    """What is minimised on a split and those that it mixes with, at the highest alpha."""
    return Objective(
        kind=config.loss,
        alpha=config.alpha,
        temperature=config.temperature,
        sampled=config.teacher is None and split.spec.keep.is_sampled,
        bucket=config.tail == "bucket",
        student_temperature=config.student_temperature,
        adaptive_temperature=config.adaptive_temperature,
    )


def check_objective(config: TrainConfig, dataset: Dataset) -> None:
    """InputError for options that a dataset does not support."""
    method: Keep = dataset.spec.keep
    if config.teacher is not None:
        return
    if config.alpha and not dataset.spec.has_teacher:
        raise InputError(
            f"--alpha {config.alpha}: {dataset.path} holds tokens without a teacher; give --alpha 0"
            " or a --teacher"
        )
    if config.alpha and config.adaptive_temperature is not None and not method.is_sampled:
        stored = reads_entropies(config, dataset)
        logger.info(
            "%s: --adaptive-temperature %s uses %s", dataset.path, config.adaptive_temperature,
            "the teacher's entropies" if stored else "the kept entries of a position",
        )  # fmt: skip
    if config.alpha and config.tail == "bucket" and not method.has_tail:
        raise InputError(
            f"--tail bucket: {dataset.path} (--keep {method.method}) does not store the mass that"
            " was not kept"
        )
    if not (config.alpha and method.is_sampled):
        return
    if config.loss == "mse":
        raise InputError(
            f"--loss mse: {dataset.path} was sampled (--keep {method.method}); a weight is not the"
            " probability of its entry"
        )
    if config.adaptive_temperature is not None:
        raise InputError(
            f"--adaptive-temperature {config.adaptive_temperature}: {dataset.path} was sampled at"
            f" temperature {method.temperature} (--keep {method.method}), and its weights hold only"
            " there"
        )
    if config.temperature != method.temperature:
        raise InputError(
            f"--temperature {config.temperature}: {dataset.path} was sampled at temperature"
            f" {method.temperature} (--keep {method.method}), and its weights hold only there"
        )


def find_evaluation_dataset(config: TrainConfig, dataset: Dataset) -> Dataset | None:
    """The dataset to evaluate on; None, with a log line, if it has no validation split.

    InputError if no position of the split counts.
    """
    evaluation_dataset = dataset if config.eval_shards is None else Dataset.open(config.eval_shards)
    _check_tokenizers("--eval-shards", evaluation_dataset, dataset)
    if VALIDATION not in evaluation_dataset.split_names:
        logger.info(
            "%s: has no validation split, so the run evaluates nothing", evaluation_dataset.path
        )
        return None
    check_counted(evaluation_dataset.split(VALIDATION))
    return evaluation_dataset


def _check_tokenizers(option: str, other_dataset: Dataset, dataset: Dataset) -> None:
    """IdentityMismatchError unless both have the same tokenizer."""
    expected, other = dataset.spec.tokenizer.sha256, other_dataset.spec.tokenizer.sha256
    if expected != other:
        raise IdentityMismatchError(
            f"{option} {other_dataset.path}: has another tokenizer ({other[:12]}) than"
            f" {dataset.path} ({expected[:12]})"
        )
