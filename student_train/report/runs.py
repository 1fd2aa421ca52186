"""Runs as a report sees them: settings, summary and figures, read from their folders as they are.

A run may be going on while it is read: it has no summary then.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import InputError
from student_train.evaluation.tasks import TaskFigures, read_tasks, task_figures
from student_train.figure_lines import is_number, read_lines
from student_train.report.series import Series
from student_train.run_folder import RunFolder

_NOT_FIGURES = ("step", "kind", "tokens")
# Of one run; with many of them the page would grow, so they share about six times as many.
_MOST_POINTS = 400
_MOST_POINTS_TOGETHER = 2400
_LEAST_POINTS = 60


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is known of one run; `series` by kind and figure, such as "train/loss".

    `settings` are those of run.json, nested; `written_at` is when the last step was, seconds since
    1970, None before the first. `tasks` are figures of --eval-tasks by task and metric.
    """

    name: str
    settings: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    series: Mapping[str, Series]
    tasks: TaskFigures
    step: int
    tokens: float
    written_at: float | None

    def last(self, figure: str) -> float | None:
        """The newest value of a figure, None without one."""
        found = self.series.get(figure)
        return None if found is None else found.last

    def mean(self, figure: str) -> float | None:
        """The mean over all steps, None without one."""
        found = self.series.get(figure)
        return None if found is None else found.mean


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs in these folders, in this order. InputError for what is no run, or there twice."""
    places = [path.resolve() for path in paths]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise InputError(f"{paths[number]}: given twice")
    most = max(_LEAST_POINTS, min(_MOST_POINTS, _MOST_POINTS_TOGETHER // len(paths)))
    return [
        _read_run(path, name, most)
        for path, name in zip(paths, _shortest_names(places), strict=True)
    ]


def _read_run(path: Path, name: str, most: int) -> RunRecord:
    folder = RunFolder(path)
    settings = folder.settings()
    summary = folder.summary()
    series: dict[str, Series] = {}
    step, tokens = 0, 0.0
    for file in (folder.metrics, folder.speed):
        at = 0.0
        for _, line in read_lines(file):
            if line["kind"] != "validation":  # whose tokens are those of the validation split
                at = line["tokens"]
            _add(series, line, at, most)
            step, tokens = max(step, line["step"]), max(tokens, at)
    has_metrics = folder.metrics.is_file() and step > 0
    return RunRecord(
        name=name,
        settings=settings,
        summary=summary,
        series=series,
        tasks=task_figures(read_tasks(folder.tasks)),
        step=step,
        tokens=tokens,
        written_at=folder.metrics.stat().st_mtime if has_metrics else None,
    )


def _add(series: dict[str, Series], line: Mapping[str, Any], at: float, most: int) -> None:
    """Add the figures of a line, at so many tokens, to their series."""
    for figure, value in line.items():
        if figure in _NOT_FIGURES or not is_number(value) or (figure == "kd" and not value):
            continue  # kd is not computed where alpha is 0, and written as 0
        key = f"{line['kind']}/{figure}"
        if key not in series:
            series[key] = Series(most)
        series[key].add(at, value)


def _shortest_names(places: Sequence[Path]) -> list[str]:
    """The ends of the paths, as many folders of each as tell it from the others."""
    names = []
    for place in places:
        others = [other.parts for other in places if other != place]
        length = 1
        while any(other[-length:] == place.parts[-length:] for other in others):
            length += 1
        names.append(os.path.join(*place.parts[-length:]))
    return names
