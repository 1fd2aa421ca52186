"""Tasks of lm-evaluation-harness (Gao et al.), run on the exported folder of a student.

    OUT/tasks.json   what came out, by the name or file of the task that was asked for

A task is one of the harness's own, by name, or a YAML file that defines one, over data on this
machine if it says so. Results are those of the harness as they are, `acc_stderr` beside `acc`; the
filter of a metric stands behind its name unless it is none. Each task is written when it is done,
so what is interrupted goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shards import durable
from shards.errors import InputError, RunError

# Of standard errors that have no closed form; the harness takes 100,000, which is minutes.
_BOOTSTRAP_ITERATIONS = 1000
# The harness's own seed of the examples that come before a question.
_FEWSHOT_SEED = 1234

STANDARD_ERROR = "_stderr"  # behind a metric
TaskFigures = Mapping[str, Mapping[str, float]]  # task -> metric -> value


def read_tasks(file: Path) -> dict[str, Any]:
    """The content of tasks.json, empty if there is none. InputError if it cannot be read."""
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for entry in content.values():
            _figures(entry)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{file}: cannot be read ({error!r}); without it the same command runs its tasks again"
        ) from error
    return content


def task_figures(content: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """The figures in the content of tasks.json, of all tasks."""
    return {task: found for entry in content.values() for task, found in _figures(entry)}


def missing_tasks(tasks: Sequence[str], content: Mapping[str, Any]) -> list[str]:
    """Those tasks of which tasks.json has nothing, or not of the file as it is now."""
    return [
        task
        for task in tasks
        if task not in content or content[task]["file_sha256"] != _file_sha256(task)
    ]


def check_tasks(tasks: Sequence[str]) -> None:
    """InputError unless the harness is installed, knows all tasks and can load their data."""
    if not tasks:
        return
    try:
        manager = _manager(tasks)
    except ImportError as error:
        raise InputError(
            f"--eval-tasks: needs lm-evaluation-harness, pip install 'logitshards[eval]' ({error})"
        ) from error
    for task in tasks:
        if not Path(task).is_file() and task not in manager.task_index:
            raise InputError(
                f"--eval-tasks {task}: no task of lm-evaluation-harness and no YAML file"
            )
        _load(manager, task)


def run_tasks(
    tasks: Sequence[str],
    model: Path,
    file: Path,
    *,
    batch_size: int,
    dtype: str,
    add_bos: bool,
    device: str,
) -> None:
    """Evaluate the model in a folder on tasks, writing each to `file`.

    `add_bos` is whether documents began with the token in training. InputError for a task that
    cannot be loaded, RunError for one that fails.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _manager(tasks)
    student = HFLM(
        pretrained=str(model),
        dtype=dtype,
        batch_size=batch_size,
        device=device,
        add_bos_token=add_bos,
    )
    for task in tasks:
        loaded = _load(manager, task)
        for part in loaded["tasks"].values():
            if part.get_config("num_fewshot") is None:
                part.set_config(key="num_fewshot", value=0)
            part.set_fewshot_seed(seed=_FEWSHOT_SEED)
        try:
            found = evaluate(
                lm=student,
                task_dict=loaded,
                bootstrap_iters=_BOOTSTRAP_ITERATIONS,
                log_samples=False,
            )
        except Exception as error:  # a task can be anybody's code
            raise RunError(
                f"--eval-tasks {task}: failed: {error!r}; the student is complete in {model}, and"
                " the same command goes on with this task"
            ) from error
        entry = {
            "file_sha256": _file_sha256(task),
            "lm_eval_version": version("lm_eval"),
            "results": {name: _metrics(values) for name, values in found["results"].items()},
            "examples": {name: sizes["effective"] for name, sizes in found["n-samples"].items()},
        }
        durable.replace(file, json.dumps(read_tasks(file) | {task: entry}, indent=2) + "\n")


def _figures(entry: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    return list(entry["results"].items())


def _manager(tasks: Sequence[str]) -> Any:
    """The harness's list of tasks; of all its own only if one is asked for, they are thousands."""
    import datasets
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    return TaskManager(include_defaults=not all(Path(task).is_file() for task in tasks))


def _load(manager: Any, task: str) -> Any:
    """A task with its data. InputError if that fails."""
    try:
        return manager.load([task])
    except Exception as error:  # a task can be anybody's code
        raise InputError(
            f"--eval-tasks {task}: cannot be loaded: {' '.join(str(error).split())}"
        ) from error


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among what the harness says of a task, whose metrics are "name,filter"."""
    found = {}
    for key, value in values.items():
        metric, separator, filter_name = key.partition(",")
        if separator and isinstance(value, int | float):
            name = metric.removesuffix(STANDARD_ERROR)
            shown = name if filter_name == "none" else f"{name} {filter_name}"
            found[shown + metric[len(name) :]] = float(value)
    return found


def _file_sha256(task: str) -> str | None:
    """Of the YAML file that defines a task; None for one of the harness's own."""
    path = Path(task)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
