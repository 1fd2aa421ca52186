"""Axes of charts: which range they show, where their ticks are, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

Point = tuple[float, float, float, float]  # x, y, and the lowest and highest y merged in it

GIB = 1 << 30
_STEPS = (1, 2, 2.5, 5, 10)
# Of the tokens, at the beginning: where a loss falls from where it starts at random.
_BEGINNING = 0.05
_LEAST_POINTS_TO_CUT = 20
_PADDING = 0.05


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers from low to high, evenly spaced."""
    rough = (high - low) / max(1, most - 1)
    size = 10.0 ** math.floor(math.log10(rough))
    for factor in _STEPS:
        step = factor * size
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [number * step for number in range(first, last + 1)]


def tight_range(curves: Sequence[Sequence[Point]]) -> tuple[float, float]:
    """The range of y in which curves of (x, y, low, high) can be told apart.

    What is above it in the first 5 % of x is cut off: a loss that falls from 11 to 2.5 would leave
    nothing of the differences at its end. Curves of few points are shown whole. Of the extremes of
    merged steps there is room for the usual ones, their medians, and not for every spike.
    """
    end = max(point[0] for curve in curves for point in curve)
    values: list[float] = []
    for curve in curves:
        rest = [point for point in curve if point[0] >= _BEGINNING * end]
        shown = rest if len(curve) >= _LEAST_POINTS_TO_CUT and rest else curve
        values += [point[1] for point in shown]
        values.append(median(point[2] for point in shown))
        values.append(median(point[3] for point in shown))
    return min(values), max(values)


def padded(low: float, high: float) -> tuple[float, float]:
    """A little room on both sides, and some even around one value alone."""
    room = _PADDING * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def count(value: float) -> str:
    """`0`, `950`, `12.5k`, `1M`, `2.25B`, `1T`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def scientific(value: float) -> str:
    """`0`, `3e-4`, `1.25e-3`."""
    if not value:
        return "0"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}" if int(exponent) else mantissa


def decimals_of(step: float) -> int:
    """Digits after the point that tell ticks apart which are `step` apart."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    while abs(round(step, decimals) - step) > 1e-6 * step:
        decimals += 1
    return decimals
