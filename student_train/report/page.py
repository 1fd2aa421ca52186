"""`train-student report`: one HTML file that shows how runs went and loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import InputError
from shards.files import durable
from student_train.evaluation.definitions import DEFINITIONS
from student_train.report.runs import SECTIONS, Array, Figure, Run, read_runs

try:
    import altair as alt
    import jinja2
    import vl_convert
except ImportError as error:
    raise InputError(
        f"missing packages, those of the extra 'report' of logitshards ({error})"
    ) from error

# Points of the longest curves, of all runs in a chart, of a curve at least, and with a dot each.
_MOST_POINTS, _MOST_TOGETHER, _LEAST_POINTS, _FEW_POINTS = 400, 1600, 60, 24
_COLUMNS = ("tokens", "mean", "lowest", "highest")
_DASHES = [[1, 0]] * 6 + [[5, 3]] * 6 + [[2, 2]] * 6  # the page has six colours


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Write the page of the runs in these folders; an existing file is replaced.

    InputError for a folder without a readable run, and for a file that cannot be written.
    """
    if not out.parent.is_dir() or out.is_dir():
        raise InputError(f"--out {out}: expected the name of a file in a folder that exists")
    runs = read_runs(paths)
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    page = pages.get_template("page.html").render(
        runs=runs,
        outcomes=_side_by_side([run.outcome for run in runs]),
        settings=_side_by_side([run.settings for run in runs]),
        sections=SECTIONS,
        figures={key for run in runs for key in run.series},
        chart_of=partial(_chart, runs),
        vega=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed"),
    )
    try:
        durable.replace(out, page)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error


def _side_by_side(columns: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    titles = dict.fromkeys(title for column in columns for title in column)
    return {title: [column.get(title, "\N{EN DASH}") for column in columns] for title in titles}


def _chart(runs: Sequence[Run], figure: Figure) -> dict[str, Any]:
    """Vega-Lite of a figure of all runs, which takes its width and its colours from the page."""
    limit = max(_LEAST_POINTS, min(_MOST_POINTS, _MOST_TOGETHER // len(runs)))
    key = figure.key
    curves = {i: thin(r.series[key], limit) for i, r in enumerate(runs) if key in r.series}
    teacher = key.replace("/", "/teacher_")
    teachers = sorted({float(run.series[teacher][-1, 1]) for run in runs if teacher in run.series})
    domain = _y_domain(figure.high, list(curves.values()), teachers)
    ticks = f"~{figure.form[-1]}" if figure.form[-1] in "%e" else alt.Undefined
    axis = alt.Axis(format=ticks, labelExpr="datum.value == 0 ? 0 : datum.label", tickCount=5)
    y = partial(alt.Y, title=None, scale=alt.Scale(domain=domain, nice=False), axis=axis)
    x = alt.X("tokens:Q").scale(domain=[0, 1.01 * max(run.tokens for run in runs) or 1], nice=False)
    x = x.axis(labelExpr="replace(format(datum.value, '~s'), 'G', 'B')", tickCount=5)
    numbers = list(range(len(runs)))
    base = (
        alt.Chart(alt.NamedData("runs"))
        .transform_filter("shown[datum.run]")
        .transform_flatten([*_COLUMNS])
        .encode(x, y("mean:Q"), alt.Color("run:N").scale(domain=numbers).legend(None))
    )
    dash = alt.StrokeDash("run:N").scale(domain=numbers, range=_DASHES).legend(None)
    near = alt.selection_point("near", fields=["run", "tokens"], nearest=True, on="pointerover")
    few = max(map(len, curves.values())) <= _FEW_POINTS
    tooltip = [alt.Tooltip("run:Q", formatType="runName"), alt.Tooltip("tokens:Q", format=",.0f")]
    tooltip += [alt.Tooltip(f"{name}:Q", format=figure.form) for name in _COLUMNS[1:]]
    opacity = alt.when(near, empty=False).then(alt.value(1)).otherwise(alt.value(int(few)))
    line = alt.Chart(alt.NamedData("teachers")).encode(y("value:Q"))
    chart = alt.layer(
        base.mark_area(clip=True, opacity=0.18).encode(y("lowest:Q"), alt.Y2("highest")),
        base.mark_line(clip=True, strokeWidth=1.8).encode(dash),
        base.mark_circle(clip=True).encode(opacity=opacity, tooltip=tooltip).add_params(near),
        line.mark_rule(clip=True, color="gray", strokeDash=[2, 3]),
        line.mark_text(clip=True, color="gray", align="left", dy=-6, x=4, text="teacher"),
    )
    chart = chart.add_params(alt.param("shown", value=[True] * len(runs)))
    notes = [text for name, text in DEFINITIONS.items() if key == f"validation/{name}"]
    notes += [f"teacher: {value:.3f}" for value in teachers]
    chart = chart.properties(width="container", height=200, description="; ".join(notes))
    columns = {i: zip(_COLUMNS, curve.T.tolist(), strict=True) for i, curve in curves.items()}
    data = [{"run": i, **dict(column)} for i, column in columns.items()]
    lines = [{"value": value} for value in teachers]
    return chart.to_dict() | {"datasets": {"runs": data, "teachers": lines}}


def thin(series: Array, limit: int) -> Array:
    """At most `limit` points of neighbouring steps; a spike of one step is the highest of a point.

    Returns [points, 4]: the mean of the tokens; mean, lowest and highest of the values, 6 digits.
    """
    starts = np.arange(0, len(series), -(-len(series) // limit))
    means = np.add.reduceat(series, starts) / np.diff(starts, append=len(series))[:, None]
    extremes = [each.reduceat(series[:, 1], starts) for each in (np.minimum, np.maximum)]
    points = np.column_stack([means, *extremes])
    return np.array([[float(f"{number:.6g}") for number in row] for row in points])


def _y_domain(high: float | None, curves: list[Array], teachers: list[float]) -> list[float]:
    """Where curves can be told apart: without single spikes, and without the first 5 % of a curve.

    A teacher's value is included if it leaves the curves half of the range.
    """
    values = np.concatenate([curve[len(curve) // 20 :] for curve in curves])
    lowest = min(values[:, 1].min(), np.median(values[:, 2]))
    highest = max(values[:, 1].max(), np.median(values[:, 3]))
    if high is not None:
        return [0.0, max(1.05 * float(highest), high) or 1.0]
    near = [t for t in teachers if 2 * lowest - highest < t < 2 * highest - lowest]
    lowest, highest = min([lowest, *near]), max([highest, *near])
    room = 0.05 * (highest - lowest) or 0.05 * abs(highest) or 1.0
    return [float(lowest - room), float(highest + room)]
