"""The tables of a report: figures of the runs, and their settings with what differs first."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from shards.process.progress import duration
from student_train.evaluation.tasks import STANDARD_ERROR
from student_train.report.axes import GIB, count
from student_train.report.runs import RunRecord

_ABSENT = "\N{EN DASH}"
# Neither a path of its own nor what is done with the result makes a run another one.
_NOT_COMPARED = ("out", "eval_tasks")


def figures_table(runs: Sequence[RunRecord]) -> str:
    """The settings in which runs differ, then what came out: state, size, quality, speed.

    Figures that no run has are left out.
    """
    rows = [
        _row(key, cells, differs=True)
        for key, cells, differs in _settings(runs)
        # That one run has more datasets than another is seen at `shards`.
        if differs and not (key.startswith("dataset_") and _ABSENT in cells)
    ]
    for title, text in _FIGURES:
        cells = [text(run) for run in runs]
        if any(cell is not None for cell in cells):
            rows.append(_row(title, [_ABSENT if cell is None else cell for cell in cells]))
    rows += [_row(f"{task} {metric}", cells) for task, metric, cells in _tasks(runs)]
    return _table(runs, rows)


def settings_table(runs: Sequence[RunRecord]) -> str:
    """All settings, those that differ between runs marked."""
    settings = _settings(runs)
    return _table(runs, [_row(key, cells, differs=differs) for key, cells, differs in settings])


def _tasks(runs: Sequence[RunRecord]) -> list[tuple[str, str, list[str]]]:
    """(task, metric, text for each run) of all tasks that any run was evaluated on."""
    metrics = {
        (task, metric): None
        for run in runs
        for task, figures in run.tasks.items()
        for metric in figures
        if not metric.endswith(STANDARD_ERROR)
    }
    return [
        (task, metric, [_task_figure(run.tasks.get(task, {}), metric) for run in runs])
        for task, metric in metrics
    ]


def _task_figure(figures: Mapping[str, float], metric: str) -> str:
    if metric not in figures:
        return _ABSENT
    error = figures.get(f"{metric}{STANDARD_ERROR}")
    beside = "" if error is None else f" \N{PLUS-MINUS SIGN} {error:.4f}"
    return f"{figures[metric]:.4f}{beside}"


def _settings(runs: Sequence[RunRecord]) -> list[tuple[str, list[str], bool]]:
    """(name, text for each run, whether they differ)."""
    flat = [_flat_settings(run) for run in runs]
    found = []
    for key in dict.fromkeys(key for each in flat for key in each):
        cells = [each.get(key, _ABSENT) for each in flat]
        found.append((key, cells, key not in _NOT_COMPARED and len(set(cells)) > 1))
    return found


def _flat_settings(run: RunRecord) -> dict[str, str]:
    """All settings as text: options by their names, then the dataset's, nested keys dotted."""
    settings = dict(run.settings)
    options = settings.pop("config", {})
    dataset, evaluation = settings.get("dataset"), settings.get("evaluation_dataset")
    if evaluation is not None and evaluation == dataset:
        settings["evaluation_dataset"] = "the same dataset"
    flat = _flat(options, "") if isinstance(options, Mapping) else {"config": _text(options)}
    return flat | _flat(settings, "")


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _text(value)
    return flat


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(runs: Sequence[RunRecord], rows: Sequence[str]) -> str:
    names = "".join(
        f'<th scope="col"><div class="swatch r{number}"></div>{escape(run.name)}</th>'
        for number, run in enumerate(runs)
    )
    return (
        f'<div class="table"><table><thead><tr><th scope="col"></th>{names}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(title: str, cells: Sequence[str], *, differs: bool = False) -> str:
    mark = ' class="differs"' if differs else ""
    values = "".join(f"<td>{_cell(cell)}</td>" for cell in cells)
    breakable = escape(title).replace("_", "_<wbr>").replace(".", ".<wbr>")
    return f'<tr{mark}><th scope="row">{breakable}</th>{values}</tr>'


def _cell(text: str) -> str:
    """The text; of a hash its beginning, and all of it under the pointer."""
    if re.fullmatch(r"[0-9a-f]{40,}", text):
        return f'<span title="{text}">{text[:12]}...</span>'
    return escape(text)


def _state(run: RunRecord) -> str:
    if run.summary is not None:
        return "finished"
    return "no step yet" if run.written_at is None else "not finished"


def _written(run: RunRecord) -> str | None:
    if run.summary is not None or run.written_at is None:
        return None
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.written_at))


def _tokens(run: RunRecord) -> str:
    planned = _option(run, "tokens")
    text = count(run.tokens)
    if run.summary is None and isinstance(planned, int) and planned > 0:
        text += f" of {count(planned)} ({min(1, run.tokens / planned):.0%})"
    return text


def _option(run: RunRecord, name: str) -> Any:
    options = run.settings.get("config")
    return options.get(name) if isinstance(options, Mapping) else None


def _summary(name: str, form: Callable[[float], str]) -> Callable[[RunRecord], str | None]:
    """A number of the summary, or one for each of several datasets."""

    def text(run: RunRecord) -> str | None:
        value = (run.summary or {}).get(name)
        if isinstance(value, list):
            return ", ".join(map(form, value))
        return form(value) if isinstance(value, int | float) else None

    return text


def _last(figure: str, form: Callable[[float], str]) -> Callable[[RunRecord], str | None]:
    """The newest value of a series."""

    def text(run: RunRecord) -> str | None:
        value = run.last(figure)
        return None if value is None else form(value)

    return text


def _mean(figure: str, form: Callable[[float], str]) -> Callable[[RunRecord], str | None]:
    """The mean of a series over all steps."""

    def text(run: RunRecord) -> str | None:
        value = run.mean(figure)
        return None if value is None else form(value)

    return text


def _high(figure: str, form: Callable[[float], str]) -> Callable[[RunRecord], str | None]:
    """The largest value of a series."""

    def text(run: RunRecord) -> str | None:
        return form(run.series[figure].high) if figure in run.series else None

    return text


def _seconds(run: RunRecord) -> float | None:
    """Time of the training steps of all processes that worked on a run."""
    found = run.series.get("speed/seconds")
    if found is not None:
        return found.sum
    seconds = (run.summary or {}).get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else None


def _time(run: RunRecord) -> str | None:
    seconds = _seconds(run)
    return None if seconds is None else duration(seconds)


def _speed(run: RunRecord) -> str | None:
    seconds = _seconds(run)
    return f"{run.tokens / seconds:,.0f}" if seconds else None


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _gib(value: float) -> str:
    return f"{value / GIB:.2f} GiB"


_FIGURES: Sequence[tuple[str, Callable[[RunRecord], str | None]]] = (
    ("state", _state),
    ("last step written", _written),
    ("steps", lambda run: f"{run.step:,}"),
    ("tokens", _tokens),
    ("epochs", _summary("epochs", _fixed(2))),
    ("parameters", _summary("parameters", count)),
    ("beside embedding and head", _summary("parameters_beside_embedding", count)),
    ("validation cross-entropy, nats", _last("validation/cross_entropy", _fixed(4))),
    ("validation perplexity", _last("validation/perplexity", "{:,.4g}".format)),
    ("bits per byte", _last("validation/bits_per_byte", _fixed(4))),
    ("calibration error", _last("validation/calibration_error", _fixed(4))),
    ("the teacher's cross-entropy, nats", _last("validation/teacher_cross_entropy", _fixed(4))),
    ("KL to the kept entries, nats", _last("validation/kl_kept", _fixed(4))),
    ("KL to the teacher, lower bound, nats", _last("validation/kl_bound", _fixed(4))),
    ("KL to the teacher, estimate, nats", _last("validation/kl_unbiased", _fixed(4))),
    ("top-1 agreement with the teacher", _last("validation/top1_agreement", _percent)),
    ("time of training steps", _time),
    ("tokens/s", _speed),
    ("model FLOP utilisation, mean", _mean("speed/flop_utilisation", _percent)),
    ("waiting for data, mean", _mean("speed/data_wait", _percent)),
    ("peak memory of the process", _high("speed/peak_memory_bytes", _gib)),
    ("peak memory of the GPU", _high("speed/peak_cuda_memory_bytes", _gib)),
)
