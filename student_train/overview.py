"""What a run says about itself: its sizes when it starts, and its summary at the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedModel

from shards.dataset import Split
from shards.files.json_text import Json
from shards.spec import VALIDATION
from student_train.checkpoint import Progress
from student_train.config import TrainConfig
from student_train.data.stream import shares_of
from student_train.figure_lines import read_lines
from student_train.model.model import num_parameters
from student_train.run_folder import RunFolder

logger = logging.getLogger(__name__)


def log_start(
    config: TrainConfig,
    model: PreTrainedModel,
    splits: Sequence[Split],
    progress: Progress,
    step_sequences: int,
    num_steps: int,
) -> None:
    """Log the student's size, the steps, the epochs of each of several datasets, and the start."""
    total, beside = num_parameters(model)
    logger.info(
        "%s: %d parameters, %d without embedding and head; %d steps of %d sequences",
        config.student,
        total,
        beside,
        num_steps,
        step_sequences,
    )
    if len(splits) > 1:
        positions = num_steps * step_sequences * splits[0].spec.sequence_length
        for split, share in zip(splits, shares_of(config.weights, splits), strict=True):
            epochs = share * positions / split.num_positions
            logger.info("%s: %.1f %% of the lines, %.2f epochs", split.path, 100 * share, epochs)
    if progress.step:
        logger.info("continuing after step %d", progress.step)


def summarise(
    folder: RunFolder, model: PreTrainedModel, progress: Progress, splits: Sequence[Split]
) -> dict[str, Json]:
    """The result of a run, flat: where it is, its size, figures of the last evaluation, speed.

    The speed is that of all processes that worked on the run.
    """
    total, beside = num_parameters(model)
    epochs = [
        done / split.num_sequences for done, split in zip(progress.sequences, splits, strict=True)
    ]
    evaluation = progress.evaluation or {}
    seconds = sum(line["seconds"] for _, line in read_lines(folder.speed))
    return {
        "model": str(folder.model),
        "parameters": total,
        "parameters_beside_embedding": beside,
        "steps": progress.step,
        "tokens": progress.tokens,
        "epochs": epochs,
        **{f"{VALIDATION}_{name}": value for name, value in evaluation.items()},
        "seconds": seconds,
        "tokens_per_s": progress.tokens / max(seconds, 1e-9),
    }
