"""A run of `train-student`: from datasets of shards to a student, its figures and its tasks.

It checks everything before it writes anything. The same command again continues with the remaining
steps (`loop.py`), then with the remaining tasks (`evaluation/tasks.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from shards.dataset import Dataset
from shards.errors import RunError, first_line
from shards.files.json_text import Json
from shards.process.folder_lock import folder_lock
from shards.spec import TRAIN
from student_train.config import TrainConfig
from student_train.data.lines import packed_length
from student_train.evaluation.evaluate import check_counted
from student_train.evaluation.tasks import (
    check_tasks,
    missing_tasks,
    read_tasks,
    run_tasks,
    task_figures,
)
from student_train.loop import Training
from student_train.model.blocks import prepare_blocks
from student_train.model.model import check_sizes, default_learning_rate, export, make_student
from student_train.model.packed_attention import block_at_joints
from student_train.run_folder import RunFolder, describe_run, publish_folder
from student_train.setup import find_evaluation_dataset, open_datasets, plan_steps
from student_train.step import autocast_for

logger = logging.getLogger(__name__)


def run(config: TrainConfig) -> dict[str, Json]:
    """Train a student, or continue; returns the summary, for a finished run at once.

    InputError, ShardError or IdentityMismatchError for what does not fit together, before anything
    is written; RunError for a run that fails.
    """
    with _failures_named(config.out):
        return _run(config)


def _run(config: TrainConfig) -> dict[str, Json]:
    disable_progress_bar()
    datasets = open_datasets(config)
    evaluation_dataset = find_evaluation_dataset(config, datasets[0])
    rate = config.learning_rate or default_learning_rate(config.student)
    config = replace(config, learning_rate=rate)
    for dataset in datasets:
        check_counted(dataset.split(TRAIN))
    folder = RunFolder(config.out)
    description = describe_run(config, datasets, evaluation_dataset)
    folder.check(description)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tasks = list(dict.fromkeys(config.eval_tasks))
    missing = missing_tasks(tasks, read_tasks(folder.tasks))
    manager = check_tasks(tasks) if missing else None
    summary = folder.summary()
    if summary is None:
        summary = _train(config, datasets, evaluation_dataset, folder, description, device)
    elif not missing:
        logger.info("%s: already finished, nothing to do", config.out)
    if missing:
        with folder_lock(folder.path, "train-student"):
            run_tasks(
                tasks,
                manager,
                folder.model,
                folder.tasks,
                spec=datasets[0].spec,
                dtype=config.dtype,
                device=str(device),
            )
    for task, figures in task_figures(read_tasks(folder.tasks)).items():
        summary |= {f"{task}_{metric}": value for metric, value in figures.items()}
    return summary


@contextmanager
def _failures_named(out: Path) -> Iterator[None]:
    """RunError if a disk or a device runs out of space, anywhere in a run."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{out}: out of memory ({first_line(error)}); the same command with a smaller"
            " --micro-batch-sequences continues"
        ) from error
    except (OSError, SafetensorError) as error:
        path = getattr(error, "filename", None) or out
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RunError(
            f"{path}: {reason}; saved steps are kept; run the same command again to continue"
        ) from error


def _train(
    config: TrainConfig,
    datasets: Sequence[Dataset],
    evaluation_dataset: Dataset | None,
    folder: RunFolder,
    description: dict[str, Json],
    device: torch.device,
) -> dict[str, Json]:
    """The summary of a run that is finished when this returns."""
    dataset = datasets[0]
    splits = [other.split(TRAIN) for other in datasets]
    step_sequences, num_steps = plan_steps(config, dataset)
    model = make_student(config.student, dataset, config.seed).to(device)
    read = datasets if evaluation_dataset is None else [*datasets, evaluation_dataset]
    for other in read[1:]:
        check_sizes(config.student, model, other)
    packed = [other for other in read if packed_length(other.spec) is not None]
    length = dataset.spec.sequence_length
    autocast = autocast_for(config.dtype, device)
    if packed:
        block_at_joints(config.student, model, packed[0].path, length=length, autocast=autocast)
    prepare_blocks(
        config, model.train(), sequence_length=length, packed=bool(packed), autocast=autocast
    )
    with folder_lock(folder.path, "train-student"):
        folder.start(description)
        training = Training(config, splits, evaluation_dataset, model, folder)
        training.train(step_sequences, num_steps)
        publish_folder(folder.model, lambda path: export(model, dataset, path))
        summary = training.summary()
        folder.finish(summary)
    return summary
