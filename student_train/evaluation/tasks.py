"""Tasks of lm-evaluation-harness (Gao et al.), run on the exported folder of a student.

    OUT/tasks.json   the tasks that were asked for, and the results as the harness gives them

The student reads a text as it read documents in training (`harness_student.py`).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import InputError, RunError, one_line
from shards.files import durable
from shards.files.checksums import path_sha256
from shards.spec import DatasetSpec

if TYPE_CHECKING:
    import torch

STANDARD_ERROR = "_stderr"  # behind a metric
TaskFigures = Mapping[str, Mapping[str, float]]  # task -> metric -> value

# For standard errors without a closed form. The harness's 100,000 take minutes.
_BOOTSTRAP_ITERATIONS = 1000


def read_tasks(file: Path) -> dict[str, Any]:
    """The content of tasks.json; without the file no tasks. InputError if it cannot be read."""
    if not file.is_file():
        return {"tasks": {}, "results": {}}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        objects = [content["tasks"], content["results"], *content["results"].values()]
        if not all(isinstance(part, dict) for part in objects):
            raise ValueError("not the results of tasks")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file}: cannot be read ({error!r}); without it train-student runs its tasks again"
        ) from error
    return content


def task_figures(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The figures in the content of tasks.json, whose metrics are "name,filter" there.

    The filter stands behind a name unless it is "none".
    """
    figures: dict[str, dict[str, float]] = {}
    for task, values in content["results"].items():
        for key, value in values.items():
            name, _, filter_name = key.partition(",")
            if filter_name and isinstance(value, int | float):
                metric = name.removesuffix(STANDARD_ERROR)
                shown = metric if filter_name == "none" else f"{metric} {filter_name}"
                figures.setdefault(task, {})[shown + name[len(metric) :]] = value
    return figures


def missing_tasks(tasks: Sequence[str], content: Mapping[str, Any]) -> list[str]:
    """The tasks that tasks.json does not have, or has with another content of their YAML file."""
    done = content["tasks"]
    return [task for task in tasks if task not in done or done[task] != _file_sha256(task)]


def check_tasks(tasks: Sequence[str]) -> Any:
    """Load the tasks and their data once; returns the harness's TaskManager.

    InputError without the harness, for a task that it does not know or cannot load, for one that
    needs more than a language model, and for two tasks of one name.
    """
    try:
        import datasets
        import lm_eval.models.huggingface  # noqa: F401  a missing part of it shows here
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"--eval-tasks: needs lm-evaluation-harness, the extra 'eval' of logitshards ({error})"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    # Reading the harness's own list takes seconds: it has thousands of tasks.
    manager = TaskManager(include_defaults=not all(Path(task).is_file() for task in tasks))
    owners: dict[str, str] = {}
    for task in tasks:
        try:
            loaded = manager.load([task])["tasks"]
            if not loaded:
                raise ValueError("no task in it")
        except Exception as error:  # a task can be anybody's code
            raise InputError(f"--eval-tasks {task}: cannot be loaded: {one_line(error)}") from error
        for name, part in loaded.items():
            if getattr(part, "UNSAFE_CODE", False) or getattr(part, "MULTIMODAL", False):
                raise InputError(f"--eval-tasks {task}: {name} runs generated code or reads images")
            if owners.setdefault(name, task) != task:
                raise InputError(f"--eval-tasks {task}: its task {name} is also in {owners[name]}")
    return manager


def run_tasks(
    tasks: Sequence[str],
    manager: Any,
    model: Path,
    file: Path,
    *,
    spec: DatasetSpec,
    dtype: str,
    device: torch.device,
) -> None:
    """Evaluate the student in `model` on the tasks that `file` does not have, and add them to it.

    `spec` is that of the dataset it was trained on, `dtype` the one it was trained in. RunError if
    the harness fails.
    """
    from lm_eval import simple_evaluate

    from student_train.evaluation.harness_student import HarnessStudent

    before = read_tasks(file)
    asked = {task: _file_sha256(task) for task in tasks}
    try:
        with redirect_stdout(sys.stderr):  # where the harness says that it bootstraps
            found = simple_evaluate(
                model=HarnessStudent(model, spec, dtype, device),
                tasks=missing_tasks(tasks, before),
                task_manager=manager,
                bootstrap_iters=_BOOTSTRAP_ITERATIONS,
                log_samples=False,
            )
        content = {
            "tasks": asked,  # no others: one of the same name may have replaced their results
            "lm_eval_version": version("lm_eval"),
            "results": before["results"] | found["results"],
        }
        text = json.dumps(content, indent=2, default=float)  # some values are numpy's
    except Exception as error:  # a task can be anybody's code
        raise RunError(
            f"--eval-tasks {','.join(tasks)}: {error!r}; the student is complete in {model}, and"
            " the same command tries this again"
        ) from error
    durable.replace(file, text + "\n")


def _file_sha256(task: str) -> str | None:
    """The hash of the YAML file that defines a task; None for one of the harness's own."""
    return path_sha256(Path(task)) if Path(task).is_file() else None
