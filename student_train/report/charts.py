"""One chart as inline SVG: curves of several runs over the tokens trained on.

The drawing is all the data there is in the page: the script that shows the values under a pointer
takes them from the `points` of the curves and the ranges of the axes in the data attributes of the
figure. Without a script everything but that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from student_train.report.axes import (
    GIB,
    Point,
    count,
    decimals_of,
    nice_ticks,
    padded,
    scientific,
    tight_range,
)
from student_train.report.series import Series

# Of the drawing, in its own units; a third of a wide page and all of a phone's are about as wide.
WIDTH, HEIGHT = 400, 232
LEFT, RIGHT, TOP, BOTTOM = 50, 386, 10, 192
_MOST_TICKS = 6
_FEW_POINTS = 24  # with a dot each


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What a chart shows: the series `key` of all runs that have it.

    `form` says how its numbers are written: plain, percent, count, scientific or GiB. A tight chart
    shows the range of its values, any other begins at 0 and ends at `high` or above. `reference`
    is a series that is a line across, such as the teacher's own figure.
    """

    key: str
    title: str
    note: str = ""
    form: str = "plain"
    tight: bool = False
    high: float | None = None
    reference: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """A curve of the run with this number."""

    run: int
    points: list[Point]


@dataclass(frozen=True, kw_only=True)
class _Plot:
    """The range of values that a drawing shows, and where they lie in it."""

    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (RIGHT - LEFT) * value / self.x_high

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - self.y_low) / (self.y_high - self.y_low)


def draw(chart: Chart, series: Sequence[Mapping[str, Series]], end_tokens: float) -> str:
    """A figure of the series of all runs up to `end_tokens`; "" if no run has any."""
    scale = 1 / GIB if chart.form == "GiB" else 1.0
    curves = [
        _curve(number, found[chart.key], scale)
        for number, found in enumerate(series)
        if chart.key in found
    ]
    if not curves:
        return ""
    references = {
        found[chart.reference].last
        for found in series
        if chart.reference and chart.reference in found
    }
    plot = _make_plot(chart, curves, sorted(references), end_tokens)
    ticks = nice_ticks(plot.y_low, plot.y_high, _MOST_TICKS)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else plot.y_high - plot.y_low
    write, digits = _format(chart.form, step)
    body = [
        *(_horizontal(plot, tick, write(tick)) for tick in ticks),
        *(_vertical(plot, tick) for tick in nice_ticks(0, plot.x_high, _MOST_TICKS)),
        f'<text class="axis" x="{RIGHT}" y="{HEIGHT - 4}" text-anchor="end">tokens</text>',
        *(_reference(plot, value) for value in references if plot.y_low < value < plot.y_high),
        '<g clip-path="url(#plot)">',
        *(_band(plot, curve) for curve in curves),
        *(_line(plot, curve) for curve in curves),
        "</g>",
    ]
    return (
        f'<figure class="chart" data-x="{plot.x_high:.8g}" data-low="{plot.y_low:.8g}"'
        f' data-high="{plot.y_high:.8g}" data-form="{chart.form}" data-digits="{digits}">'
        f"<figcaption><h3>{escape(chart.title)}</h3>"
        f"<p>{escape(_note(chart, curves, plot, references, write))}</p></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">'
        f"{''.join(body)}</svg></figure>"
    )


def _curve(run: int, series: Series, scale: float) -> _Curve:
    points = [
        (bucket.tokens, bucket.mean * scale, bucket.low * scale, bucket.high * scale)
        for bucket in series.buckets
    ]
    return _Curve(run=run, points=points)


def _make_plot(
    chart: Chart, curves: Sequence[_Curve], references: Sequence[float], end_tokens: float
) -> _Plot:
    """The ranges of both axes; a reference is shown if it does not squeeze the curves by half."""
    if chart.tight:
        low, high = tight_range([curve.points for curve in curves])
        for value in references:
            if low - (high - low) < value < high + (high - low):
                low, high = min(low, value), max(high, value)
        low, high = padded(low, high)
    else:
        low, high = 0.0, max(point[1] for curve in curves for point in curve.points)
        high = max(1.05 * high, chart.high or 0.0) or 1.0
    return _Plot(x_high=end_tokens or 1.0, y_low=low, y_high=high)


def _format(form: str, step: float) -> tuple[Callable[[float], str], int]:
    """How ticks of a form are written, and digits after the point of values between them."""
    if form in ("count", "scientific"):
        return (count if form == "count" else scientific), 0
    decimals = decimals_of(100 * step if form == "percent" else step)
    if form == "percent":
        return (lambda value: f"{100 * value:.{decimals}f}%"), decimals + 1
    return (lambda value: f"{value:.{decimals}f}"), decimals + 2


def _note(
    chart: Chart,
    curves: Sequence[_Curve],
    plot: _Plot,
    references: Iterable[float],
    write: Callable[[float], str],
) -> str:
    parts = [chart.note] if chart.note else []
    parts += [f"teacher: {value:.3f}" for value in sorted(references)]
    highest = max(point[1] for curve in curves for point in curve.points)
    if highest > plot.y_high:
        parts.append(f"the highest, {write(highest)}, is cut off")
    return "; ".join(parts)


def _horizontal(plot: _Plot, value: float, text: str) -> str:
    y = plot.y(value)
    return (
        f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _vertical(plot: _Plot, value: float) -> str:
    x = plot.x(value)
    anchor = "middle" if x < RIGHT - 20 else "end"
    return (
        f'<path class="grid" d="M{x:.1f} {TOP}V{BOTTOM}"/>'
        f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 15}" text-anchor="{anchor}">'
        f"{count(value)}</text>"
    )


def _reference(plot: _Plot, value: float) -> str:
    y = plot.y(value)
    return (
        f'<path class="reference" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
        f'<text class="axis" x="{LEFT + 4}" y="{y - 4:.1f}">teacher</text>'
    )


def _band(plot: _Plot, curve: _Curve) -> str:
    """What lies between the extremes of merged steps; nothing where that is less than a line."""
    if not any(plot.y(low) - plot.y(high) > 1 for _, _, low, high in curve.points):
        return ""
    upper = [(plot.x(x), plot.y(high)) for x, _, _, high in curve.points]
    lower = [(plot.x(x), plot.y(low)) for x, _, low, _ in reversed(curve.points)]
    points = " ".join(f"{x:.1f},{_drawable(y):.1f}" for x, y in upper + lower)
    return f'<polygon class="band r{curve.run}" points="{points}"/>'


def _line(plot: _Plot, curve: _Curve) -> str:
    """A curve; what is level between its neighbours is left out."""
    points = [(plot.x(x), f"{plot.y(y):.2f}") for x, y, _, _ in curve.points]
    kept = [
        (x, y)
        for i, (x, y) in enumerate(points)
        if not 0 < i < len(points) - 1 or not points[i - 1][1] == y == points[i + 1][1]
    ]
    text = " ".join(f"{x:.1f},{y}" for x, y in kept)
    line = f'<polyline class="curve r{curve.run}" data-run="{curve.run}" points="{text}"/>'
    if len(points) > _FEW_POINTS:
        return line
    dots = (f'<circle class="dot r{curve.run}" cx="{x:.1f}" cy="{y}" r="2.5"/>' for x, y in points)
    return line + "".join(dots)


def _drawable(y: float) -> float:
    """A coordinate far outside as one just outside, for renderers of limited range."""
    return min(max(y, -10.0 * HEIGHT), 10.0 * HEIGHT)
