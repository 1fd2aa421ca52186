"""A user's script, checked by mypy --strict (test_python.py); its last line alone is an error."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import logitshards
from logitshards import Dataset, Objective, Row, ShardError, Split, Targets

version: str = logitshards.__version__


def means(path: Path) -> dict[str, float]:
    """The mean log-probability of labels by split."""
    try:
        dataset: Dataset = logitshards.open(path)
    except ShardError as error:
        raise SystemExit(str(error)) from error
    with dataset:
        return {name: mean(split) for name, split in dataset.items()}


def mean(split: Split) -> float:
    values: list[float] = []
    for other in split[-10::2][1:]:
        values += other.label_logprobs.tolist()
    row: Row = split[0]
    ids: npt.NDArray[np.int32] = row.ids[-1]
    logprobs: npt.NDArray[np.float32] = row.logprobs[2:5][0]
    dense: npt.NDArray[np.float64] = row.dense(0, vocab_size=row.spec.tokenizer.vocab_size)
    tail: npt.NDArray[np.float32] | None = row.tail_logmass
    positions: int = len(row) + len(ids) + len(logprobs) + len(dense) + (tail is None)
    return sum(values) / positions


def loss(hidden: torch.Tensor, head_weight: torch.Tensor, row: Row) -> torch.Tensor:
    """The loss of one row."""
    labels, targets = logitshards.labels_and_targets([row])
    checked: Targets = targets
    objective = Objective(kind="kld", alpha=0.9, temperature=1.0)
    result = logitshards.distillation_loss(hidden, head_weight, labels, checked, objective)
    return result.total


logitshards.opne("dataset")
