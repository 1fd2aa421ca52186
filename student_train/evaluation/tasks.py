"""Tasks of lm-evaluation-harness (Gao et al.), run on the exported folder of a student.

    OUT/tasks.json   what came out, by the name or the full path of the task that was asked for

A task is one of the harness's own, by name, or a YAML file that defines one, over data on this
machine if it says so. Results are those of the harness as they are, `acc_stderr` beside `acc`; the
filter of a metric stands behind its name unless it is none. Each task is written when it is done,
so what is interrupted goes on with the next one.

The student reads a text as it read documents in training: no more tokens than a sequence has, after
the same token, and with its head in float32, because bfloat16 logits tie heavily.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import InputError, RunError
from shards.files import durable
from shards.spec import DatasetSpec

STANDARD_ERROR = "_stderr"  # behind a metric
TaskFigures = Mapping[str, Mapping[str, float]]  # task -> metric -> value

# Of standard errors that have no closed form; the harness takes 100,000, which is minutes.
_BOOTSTRAP_ITERATIONS = 1000
# Those of the harness: of Python, of numpy and torch, of the examples before a question.
_SEEDS = (0, 1234, 1234)
# On a CPU: float32 logits of a batch and as many log-probabilities, which the harness holds.
_BATCH_BYTES = 1 << 30


@dataclass(frozen=True)
class LoadedTask:
    """A task as it was asked for, its key in tasks.json, and what the harness made of it."""

    asked: str
    key: str
    file_sha256: str | None
    content: Any


def read_tasks(file: Path) -> dict[str, Any]:
    """The content of tasks.json, empty if there is none. InputError if it cannot be read."""
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for entry in content.values():
            values = [value for task in entry["results"].values() for value in task.values()]
            if not (all(isinstance(v, int | float) for v in values) and "file_sha256" in entry):
                raise ValueError("not the results of tasks")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file}: cannot be read ({error!r}); without it train-student runs its tasks again"
        ) from error
    return content


def task_figures(content: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """The figures in the content of tasks.json; of a group its own if it has any."""
    figures: dict[str, Mapping[str, float]] = {}
    for key, entry in content.items():
        results = entry["results"]
        figures |= {key: results[key]} if results.get(key) else results
    return figures


def missing_tasks(tasks: Sequence[str], content: Mapping[str, Any]) -> list[str]:
    """Those tasks of which tasks.json has nothing, or not of the file as it is now."""
    found = []
    for task in tasks:
        entry = content.get(_key(task))
        if entry is None or entry["file_sha256"] != _file_sha256(task):
            found.append(task)
    return found


def load_tasks(tasks: Sequence[str], content: Mapping[str, Any]) -> list[LoadedTask]:
    """The tasks with their data. InputError for one that the harness does not have or cannot read.

    `content` is that of tasks.json: two tasks of one name are refused.
    """
    if not tasks:
        return []
    try:
        manager = _manager(tasks)
    except ImportError as error:
        raise InputError(
            f"--eval-tasks: needs lm-evaluation-harness, pip install 'logitshards[eval]' ({error})"
        ) from error
    owners = {name: key for key, entry in content.items() for name in entry["results"]}
    found = []
    for task in tasks:
        if not _is_file(task) and task not in manager.task_index:
            raise InputError(
                f"--eval-tasks {task}: no task of lm-evaluation-harness and no YAML file"
            )
        loaded = LoadedTask(task, _key(task), _file_sha256(task), _load(manager, task))
        for name in loaded.content["tasks"]:
            owner = owners.setdefault(name, loaded.key)
            if owner != loaded.key and (_is_file(owner) or _is_file(task)):
                raise InputError(
                    f"--eval-tasks {task}: is named {name} inside, as {owner} is; give it another"
                    " name there"
                )
        found.append(loaded)
    return found


def run_tasks(
    tasks: Sequence[LoadedTask],
    model: Path,
    file: Path,
    *,
    spec: DatasetSpec,
    dtype: str,
    device: str,
) -> None:
    """Evaluate the model in a folder on tasks, writing each to `file`.

    `spec` is of the dataset it was trained on. RunError for tasks that fail, after all
    others.
    """
    from lm_eval import evaluate

    failed = []
    try:
        with redirect_stdout(sys.stderr):
            student = _student(model, spec, dtype, device)
    except Exception as error:  # whatever the harness and transformers raise
        raise RunError(f"--eval-tasks: {model}: cannot be loaded: {error!r}") from error
    for task in tasks:
        try:
            with redirect_stdout(sys.stderr):  # where the harness says that it bootstraps
                _seed()
                found = evaluate(
                    lm=student,
                    task_dict=task.content,
                    bootstrap_iters=_BOOTSTRAP_ITERATIONS,
                    log_samples=False,
                )
                entry = _entry(task, found)
        except Exception as error:  # a task can be anybody's code
            failed.append(f"{task.asked}: {error!r}")
            continue
        others = {key: old for key, old in read_tasks(file).items() if key != task.key}
        durable.replace(file, json.dumps(others | {task.key: entry}, indent=2) + "\n")
    if failed:
        raise RunError(
            f"--eval-tasks {'; '.join(failed)}; the student is complete in {model}, and the same"
            " command tries this again"
        )


def _manager(tasks: Sequence[str]) -> Any:
    """The harness's list of tasks; of all its own only if one is asked for, they are thousands."""
    import datasets
    import lm_eval.models.huggingface  # noqa: F401  what it needs is to be missed now, not at the end
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    return TaskManager(include_defaults=not all(map(_is_file, tasks)))


def _load(manager: Any, task: str) -> Any:
    """A task, or the tasks of a group, with their data. InputError if they cannot be run."""
    if _is_file(task) and re.search(r"(?m)^group:", Path(task).read_text(encoding="utf-8")):
        raise InputError(f"--eval-tasks {task}: defines a group; expected one task in a file")
    _seed()
    try:
        loaded = manager.load([task])
    except Exception as error:  # a task can be anybody's code
        raise InputError(
            f"--eval-tasks {task}: cannot be loaded: {' '.join(str(error).split())}"
        ) from error
    for name, part in loaded["tasks"].items():
        for attribute, reason in (
            ("UNSAFE_CODE", "runs code that a model wrote"),
            ("MULTIMODAL", "is not of text alone"),
        ):
            if getattr(part, attribute, False):
                raise InputError(f"--eval-tasks {task}: {name} {reason}, which is not done here")
        if part.get_config("num_fewshot") is None:
            part.set_config(key="num_fewshot", value=0)
        part.set_fewshot_seed(seed=_SEEDS[-1])
    return loaded


def _student(model: Path, spec: DatasetSpec, dtype: str, device: str) -> Any:
    """The harness's view of a student that was trained in `dtype` on a dataset."""
    from lm_eval.models.huggingface import HFLM

    documents, length = spec.documents, spec.sequence_length
    row_bytes = 2 * 4 * length * spec.tokenizer.vocab_size
    student = HFLM(
        pretrained=str(model),
        dtype="float32",
        mixed_precision_dtype=None if dtype == "float32" else dtype,
        softmax_dtype="float32",
        device=device,
        batch_size="auto" if device == "cuda" else max(1, _BATCH_BYTES // row_bytes),
        max_length=length,
        add_bos_token=documents.bos_token_id is not None,
        prefix_token_id=documents.eos_token_id
        if documents.bos_token_id is None
        else documents.bos_token_id,
    )
    _keep_float32(student.model.get_output_embeddings())
    return student


def _keep_float32(head: Any) -> None:
    """Let a head compute in its own dtype where the rest of the model is in a narrower one."""
    import torch

    narrow = head.forward

    def wide(hidden: Any) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return narrow(hidden.to(head.weight.dtype))

    head.forward = wide


def _seed() -> None:
    """Some tasks shuffle while they load or sample while they run."""
    import torch

    random.seed(_SEEDS[0])
    np.random.seed(_SEEDS[1])
    torch.manual_seed(_SEEDS[2])


def _entry(task: LoadedTask, found: Mapping[str, Any]) -> dict[str, Any]:
    """What tasks.json says of a task. ValueError if the harness found no figure."""
    results = {name: _metrics(values) for name, values in found["results"].items()}
    if not any(results.values()):
        raise ValueError("no figure came out")
    return {
        "file_sha256": task.file_sha256,
        "lm_eval_version": version("lm_eval"),
        "results": results,
        "examples": {name: sizes["effective"] for name, sizes in found["n-samples"].items()},
    }


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The figures among what the harness says of a task, whose metrics are "name,filter"."""
    found = {}
    for key, value in values.items():
        metric, separator, filter_name = key.partition(",")
        if separator and value is not None and not isinstance(value, str):
            name = metric.removesuffix(STANDARD_ERROR)
            shown = name if filter_name == "none" else f"{name} {filter_name}"
            found[shown + metric[len(name) :]] = float(value)
    return found


def _is_file(task: str) -> bool:
    return Path(task).is_file()


def _key(task: str) -> str:
    return str(Path(task).resolve()) if _is_file(task) else task


def _file_sha256(task: str) -> str | None:
    """Of the YAML file that defines a task; None for one of the harness's own."""
    return hashlib.sha256(Path(task).read_bytes()).hexdigest() if _is_file(task) else None
