"""What a report is made of: series that are thinned, ticks of axes, and numbers as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.report.axes import count, decimals_of, nice_ticks, scientific
from student_train.report.series import Series


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(2, 30))
def test_a_series_keeps_its_extremes_its_mean_and_its_order(values: list[float], most: int) -> None:
    series = Series(most)
    for step, value in enumerate(values):
        series.add(step, value)
    assert len(series.buckets) <= most
    assert series.num == len(values)
    if not values:
        return
    assert series.high == max(values)
    assert min(bucket.low for bucket in series.buckets) == min(values)
    assert series.last == values[-1]
    assert series.mean == pytest.approx(sum(values) / len(values), abs=1e-6)
    tokens = [bucket.tokens for bucket in series.buckets]
    assert tokens == sorted(tokens)
    sizes = {bucket.num for bucket in series.buckets[:-1]}
    assert len(sizes) <= 1
    if len(values) <= most:
        assert [bucket.mean for bucket in series.buckets] == values
    else:
        assert len(series.buckets) > most // 2


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9), st.integers(3, 8))
def test_ticks_are_round_few_and_inside(low: float, span: float, most: int) -> None:
    high = low + span
    if high - low < 1e-6 * max(abs(low), abs(high)):
        return  # no range that floats can divide
    ticks = nice_ticks(low, high, most)
    assert 1 <= len(ticks) <= most
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in ticks)
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        digits = f"{step:.6e}".split("e")[0].rstrip("0")
        assert digits in ("1.", "2.", "2.5", "5.")


def test_numbers_are_written_short() -> None:
    assert [count(value) for value in (0, 950, 1000, 12_500, 999_960, 2.25e9, 1e12)] == [
        "0", "950", "1k", "12.5k", "1M", "2.25B", "1T",
    ]  # fmt: skip
    assert [scientific(value) for value in (0, 3e-4, 1.25e-3, 2)] == ["0", "3e-4", "1.25e-3", "2"]
    assert [decimals_of(step) for step in (20, 1, 0.5, 0.25, 0.02, 2.5)] == [0, 0, 1, 2, 2, 1]
