"""Runs as a report shows them, read from their folders: series of figures, and texts for tables."""

from __future__ import annotations

import json
import os
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError
from shards.process.progress import count, duration
from student_train.evaluation.tasks import STANDARD_ERROR, read_tasks, task_figures
from student_train.figure_lines import is_number, read_lines
from student_train.run_folder import RunFolder

Array = NDArray[np.float64]


class Figure(NamedTuple):
    """A series that has a chart if it is `drawn`, and in the table what `cell` makes of its values.

    `form` formats a number in Python and in d3. The y axis goes from 0 to `high` or above; with
    None it fits the values.
    """

    key: str
    title: str
    form: str = ".4f"
    high: float | None = None
    cell: Callable[[Array], Any] | None = itemgetter(-1)
    drawn: bool = True


SECTIONS: Mapping[str, Sequence[Figure]] = {
    "Size": (
        Figure("summary/epochs", "Epochs", ".2f", cell=list, drawn=False),
        Figure("summary/parameters", "Parameters", ",.0f", drawn=False),
        Figure("summary/parameters_beside_embedding", "Without embeddings", ",.0f", drawn=False),
    ),
    "On held-out documents": (
        Figure("validation/cross_entropy", "Cross-entropy of the labels, nats"),
        Figure("validation/teacher_cross_entropy", "Teacher's cross-entropy, nats", drawn=False),
        Figure("validation/perplexity", "Perplexity", ",.4g", drawn=False),
        Figure("validation/bits_per_byte", "Bits per byte", drawn=False),
        Figure("validation/calibration_error", "Calibration error", drawn=False),
        Figure("validation/kl_bound", "KL to the teacher, lower bound, nats"),
        Figure("validation/kl_unbiased", "KL to the teacher, unbiased estimate, nats"),
        Figure("validation/kl_kept", "KL to the kept entries, on the same shards, nats"),
        Figure("validation/top1_agreement", "Top-1 agreement with the teacher", ".1%"),
    ),
    "Training": (
        Figure("train/loss", "Loss, (1 - alpha) lm + alpha kd", cell=None),
        Figure("train/lm", "Cross-entropy of the labels (lm), nats", cell=None),
        Figure("train/kd", "Distillation loss (kd)", cell=None),
        Figure("train/alpha", "Alpha", ".4g", 1.0, cell=None),
        Figure("train/learning_rate", "Learning rate", ".2e", 0.0, cell=None),
        Figure("train/gradient_norm", "Norm of the gradient", cell=None),
    ),
    "Speed": (
        Figure("speed/tokens_per_s", "Tokens/s", ",.0f", 0.0, cell=None),
        Figure("speed/flop_utilisation", "Model FLOP utilisation", ".1%", 0.0, np.mean),
        Figure("speed/data_wait", "Waiting for data, part of a step", ".1%", 0.05, np.mean),
        Figure("speed/peak_memory_bytes", "Peak memory of the process, GiB", ".2f", 0.0, np.max),
        Figure("speed/peak_cuda_memory_bytes", "Peak memory of the GPU, GiB", ".2f", 0.0, np.max),
    ),
}


class Run(NamedTuple):
    """A run with its series [steps, 2] of tokens and value, by kind and figure: "train/loss"."""

    name: str
    tokens: float
    series: Mapping[str, Array]
    settings: Mapping[str, str]  # texts by title
    outcome: Mapping[str, str]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders, in order. InputError if one is no run or is given twice."""
    folders = [path.resolve() for path in paths]
    if twice := [path for path in paths if folders.count(path.resolve()) > 1]:
        raise InputError(f"{twice[-1]}: given twice")
    shared = os.path.commonpath([folder.parent for folder in folders])
    return [_read_run(RunFolder(folder), os.path.relpath(folder, shared)) for folder in folders]


def _read_run(folder: RunFolder, name: str) -> Run:
    run_json, summary = folder.settings(), folder.summary()
    config = run_json.pop("config")
    for model in ("student", "teacher"):  # the hash of a file or folder, or the name again
        described = run_json.pop(model, None)
        if described != config.get(model):
            run_json[f"{model}_sha256"] = described
    settings = {**config, **run_json}
    if settings["dataset"] == settings.get("evaluation_dataset"):
        settings["evaluation_dataset"] = "the same dataset"
    step, tokens, series = _read_series(folder)
    for figure, value in (summary or {}).items():
        if numbers := list(filter(is_number, value if isinstance(value, list) else [value])):
            series[f"summary/{figure}"] = np.array([(tokens, each) for each in numbers], float)
    outcome = {"State": "finished", "Steps": f"{step:,}", "Tokens": count(tokens)}
    if summary is None:
        planned: Any = settings.get("tokens")
        outcome["Tokens"] += f" of {count(planned)}" if is_number(planned) else ""
        files = [file for file in (folder.metrics, folder.speed) if file.is_file()]
        written = time.gmtime(max((file.stat().st_mtime for file in files), default=0.0))
        last = time.strftime("not finished, last step %Y-%m-%d %H:%M UTC", written)
        outcome["State"] = last if step else "no step yet"
    seconds = series.get("speed/seconds", series.get("summary/seconds"))
    if seconds is not None and (total := float(seconds[:, 1].sum())):
        outcome |= {"Time of steps": duration(total), "Tokens/s": f"{tokens / total:,.0f}"}
    for shown in (figure for section in SECTIONS.values() for figure in section):
        if shown.cell and shown.key in series:
            cells = np.atleast_1d(shown.cell(series[shown.key][:, 1]))
            outcome[shown.title] = ", ".join(format(cell, shown.form) for cell in cells)
    for task, metrics in task_figures(read_tasks(folder.tasks)).items():
        for metric in (metric for metric in metrics if not metric.endswith(STANDARD_ERROR)):
            error = metrics.get(f"{metric}{STANDARD_ERROR}")
            beside = "" if error is None else f" \N{PLUS-MINUS SIGN} {error:.4f}"
            outcome[f"{task} {metric}"] = f"{metrics[metric]:.4f}{beside}"
    return Run(name, tokens, series, _flat(settings), outcome)


def _read_series(folder: RunFolder) -> tuple[int, float, dict[str, Array]]:
    """The last step, its tokens, and the series; those of bytes in GiB."""
    pairs: dict[str, array[float]] = defaultdict(lambda: array("d"))
    step, end = 0, 0.0
    for file in (folder.metrics, folder.speed):
        tokens = 0.0
        for _, line in read_lines(file):
            kind, trained = line.pop("kind"), line.pop("tokens", 0.0)
            if kind != "validation":  # its tokens are those of the validation split
                tokens = trained
            step, end = max(step, line.pop("step")), max(end, tokens)
            for figure, value in line.items():
                # kd is not computed where alpha is 0, and written as 0
                if is_number(value) and (value or figure != "kd"):
                    unit = 1 << 30 if figure.endswith("_bytes") else 1
                    pairs[f"{kind}/{figure}"].extend((tokens, value / unit))
    return step, end, {key: np.frombuffer(pairs[key]).reshape(-1, 2) for key in pairs}


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """The texts of a nested object by dotted keys."""
    if isinstance(value, Mapping) and value:
        parts = [_flat(part, f"{key}.{name}" if key else name) for name, part in value.items()]
        return {name: text for part in parts for name, text in part.items()}
    return {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
