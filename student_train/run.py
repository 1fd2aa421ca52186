"""A run of `train-student`: from datasets of shards to a student, its figures and its tasks.

It checks everything before it writes anything. The same command again continues with the remaining
steps (`loop.py`), then with the remaining tasks (`evaluation/tasks.py`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from shards.dataset import Dataset
from shards.errors import InputError, RunError, first_line
from shards.files.json_text import Json, json_differences
from shards.process.folder_lock import folder_lock
from shards.spec import TRAIN
from student_train.config import TrainConfig
from student_train.data.lines import packed_length
from student_train.device import describe_device, training_device
from student_train.evaluation.evaluate import check_counted
from student_train.evaluation.tasks import (
    check_tasks,
    missing_tasks,
    read_tasks,
    run_tasks,
    task_figures,
)
from student_train.live_teacher import LiveTeacher
from student_train.loop import Training
from student_train.memory import check_memory
from student_train.model.blocks import decoder_blocks, prepare_blocks
from student_train.model.model import (
    check_sizes,
    default_learning_rate,
    export,
    make_student,
    shallow_copy,
)
from student_train.model.packed_attention import block_at_joints
from student_train.own_logits.options import SaveLogits
from student_train.own_logits.plan import SavePlan, check_saved, describe, plan_saving
from student_train.own_logits.saving import OwnLogits
from student_train.processes.sharding import (
    Sharded,
    is_sharded,
    model_of,
    precision_for,
    shard,
    whole_weights,
)
from student_train.processes.world import World, joined
from student_train.run_folder import (
    RunFolder,
    agreed_settings,
    describe_run,
    publish_folder,
    run_sha256,
)
from student_train.setup import find_evaluation_dataset, open_datasets, plan_steps
from student_train.step import autocast_for

logger = logging.getLogger(__name__)


def run(config: TrainConfig, saving: SaveLogits | None = None) -> dict[str, Json] | None:
    """Train a student, or continue; returns the summary, for a finished run at once.

    `saving` says what to save of the student's own distributions; None: nothing.
    One of the processes that torchrun started for this run. Only the first returns a summary.

    InputError, ShardError or IdentityMismatchError for what does not fit together, before anything
    is written; RunError for a run that fails.
    """
    with _failures_named(config.out):
        device = training_device(config.device, int(os.environ.get("LOCAL_RANK") or 0))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with joined(device) as world:
            prepared = world.together(lambda: _prepare(config, saving or SaveLogits(), world))
            _check_agreement(prepared.description, world)
            summary = world.from_first(prepared.folder.summary() if world.is_first else None)
            if summary is None:
                summary = _train(prepared, world)
        return _run_tasks(prepared, summary, device) if world.is_first else None


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A run whose options and datasets fit together. `manager` knows the tasks that are missing."""

    config: TrainConfig
    saving: SavePlan | None
    step_sequences: int
    num_steps: int
    datasets: Sequence[Dataset]
    evaluation_dataset: Dataset | None
    folder: RunFolder
    description: dict[str, Json]
    tasks: Sequence[str]
    manager: Any


def _prepare(config: TrainConfig, options: SaveLogits, world: World) -> _Prepared:
    disable_progress_bar()
    datasets = open_datasets(config)
    evaluation_dataset = find_evaluation_dataset(config, datasets[0])
    rate = config.learning_rate or default_learning_rate(config.student)
    config = replace(config, learning_rate=rate)
    for dataset in datasets:
        check_counted(dataset.split(TRAIN))
    folder = RunFolder(config.out)
    own_logits = None if options.save_logits is None else describe(options)
    description = describe_run(config, datasets, evaluation_dataset, own_logits)
    step_sequences, num_steps = plan_steps(config, datasets[0])
    saving = plan_saving(
        options,
        config,
        datasets,
        run_sha256=run_sha256(description),
        num_steps=num_steps,
        step_sequences=step_sequences,
    )
    tasks = list(dict.fromkeys(config.eval_tasks))
    manager = None
    if world.is_first:
        folder.check(description)
        processes = f" in each of {world.size} processes" if world.size > 1 else ""
        logger.info("device: %s%s", describe_device(world.device), processes)
        missing = missing_tasks(tasks, read_tasks(folder.tasks))
        manager = check_tasks(tasks) if missing else None
        if folder.summary() is not None and not missing:
            if saving is not None:
                check_saved(saving)
            logger.info("%s: already finished, nothing to do", config.out)
    return _Prepared(
        config=config,
        saving=saving,
        step_sequences=step_sequences,
        num_steps=num_steps,
        datasets=datasets,
        evaluation_dataset=evaluation_dataset,
        folder=folder,
        description=description,
        tasks=tasks,
        manager=manager,
    )


def _check_agreement(description: Mapping[str, Json], world: World) -> None:
    """InputError if the processes of a run have other options, datasets or models."""
    own, *others = world.from_all(agreed_settings(description))
    for rank, other in enumerate(others, start=1):
        if differences := json_differences(other, own):
            world.fail(
                InputError(
                    f"process {rank} has other settings than process 0: {'; '.join(differences)}"
                    f" (here: process {rank}, there: process 0); start all with the same command"
                    " and the same files"
                )
            )


def _run_tasks(
    prepared: _Prepared, summary: dict[str, Json], device: torch.device
) -> dict[str, Json]:
    """The summary with the results of `--eval-tasks`, which one process runs."""
    folder = prepared.folder
    if prepared.manager is not None:
        with folder_lock(folder.path, "train-student"):
            run_tasks(
                prepared.tasks,
                prepared.manager,
                folder.model,
                folder.tasks,
                spec=prepared.datasets[0].spec,
                dtype=prepared.config.dtype,
                device=device,
            )
    results = task_figures(read_tasks(folder.tasks))
    return summary | {
        f"{task}_{metric}": value
        for task, figures in results.items()
        for metric, value in figures.items()
    }


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


def _train(prepared: _Prepared, world: World) -> dict[str, Json]:
    """The summary of a run that is finished when this returns; {} but for the first process."""
    config, datasets, folder = prepared.config, prepared.datasets, prepared.folder
    dataset = datasets[0]
    splits = [other.split(TRAIN) for other in datasets]
    world.together(lambda: check_memory(config, dataset, world.size, world.device))
    teacher = None
    if config.teacher is not None:
        folder_of_teacher = Path(config.teacher)
        teacher = world.together(lambda: LiveTeacher(folder_of_teacher, datasets, world.device))
    student = _make_student(prepared, world)
    with ExitStack() as stack:
        world.together(lambda: _start(prepared, stack, world))
        own = None if prepared.saving is None else OwnLogits(prepared.saving, world)
        training = Training(
            config, splits, prepared.evaluation_dataset, student, folder, world, teacher, own
        )
        training.train(prepared.step_sequences, prepared.num_steps)
        if own is not None:
            own.finish()
        _export(student, dataset, folder, world)
        if not world.is_first:
            return {}
        summary = training.summary()
        folder.finish(summary)
    return summary


def _start(prepared: _Prepared, stack: ExitStack, world: World) -> None:
    """Lock and start the run's folder, by the first process."""
    if world.is_first:
        stack.enter_context(folder_lock(prepared.folder.path, "train-student"))
        # Again: since the first check another run may have begun here, and ended.
        prepared.folder.check(prepared.description)
        if prepared.saving is not None:
            stack.enter_context(folder_lock(prepared.saving.path, "train-student"))
        prepared.folder.start(prepared.description)


def _make_student(prepared: _Prepared, world: World) -> PreTrainedModel | Sharded:
    """The student on its devices, ready to train. InputError if it cannot be trained as wanted."""
    config, datasets = prepared.config, prepared.datasets
    dataset, length = datasets[0], datasets[0].spec.sequence_length
    read = [*datasets, *filter(None, [prepared.evaluation_dataset])]

    def make() -> PreTrainedModel:
        model = make_student(config.student, dataset, config.seed, with_weights=world.is_first)
        for other in read[1:]:
            check_sizes(config.student, model, other)
        return model

    model = world.together(make)
    packed = [other for other in read if packed_length(other.spec) is not None]
    autocast = autocast_for(config.dtype, world.device)
    probe = model
    if is_sharded(world):  # it may be too large for one device
        probe = world.together(lambda: shallow_copy(model))
    probe.to(world.device)

    def prepare() -> None:
        if packed:
            block_at_joints(config.student, probe, packed[0].path, length=length, autocast=autocast)
            model.set_attn_implementation(probe.config._attn_implementation)
        prepare_blocks(
            config,
            model.train(),
            sequence_length=length,
            packed=bool(packed),
            autocast=autocast,
            probe=probe.train(),
        )

    world.together(prepare)
    precision = precision_for(config.dtype, world.device)
    return shard(model, decoder_blocks(model), world, precision)


def _export(
    student: PreTrainedModel | Sharded, dataset: Dataset, folder: RunFolder, world: World
) -> None:
    """Write the student as a Hugging Face folder, by the first process."""
    model = model_of(student)
    weights = whole_weights(model, world) if isinstance(student, Sharded) else None
    if world.is_first:
        publish_folder(folder.model, lambda path: export(model, dataset, path, weights))
