"""What a report thins: series of any length become few points that keep their extremes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.report.page import thin


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(2, 30))
def test_a_thinned_series_keeps_its_extremes_its_mean_and_its_order(
    values: list[float], most: int
) -> None:
    steps = np.arange(1, len(values) + 1)
    points = thin(np.column_stack([steps, values]), most)
    assert points.shape[1] == 4
    assert len(points) <= most
    assert (np.diff(points[:, 0]) > 0).all()
    assert points[:, 2].min() == pytest.approx(min(values), rel=1e-5)
    assert points[:, 3].max() == pytest.approx(max(values), rel=1e-5)
    assert (points[:, 2] <= points[:, 3]).all()
    if len(values) <= most:
        assert points[:, 0].tolist() == steps.tolist()
        for column in (1, 2, 3):
            assert points[:, column] == pytest.approx(values, rel=1e-5)
    else:
        width = -(-len(values) // most)
        assert len(points) == -(-len(values) // width)
        for point, start in zip(points, range(0, len(values), width), strict=True):
            part = values[start : start + width]
            expected = (np.mean(steps[start : start + width]), np.mean(part), min(part), max(part))
            assert point == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_the_last_point_may_have_fewer_steps() -> None:
    series = np.array([[10.0, 1], [20, 3], [30, 5], [40, -1], [50, 7]])
    assert thin(series, 3).tolist() == [[15, 2, 1, 3], [35, 2, -1, 5], [50, 7, 7, 7]]
