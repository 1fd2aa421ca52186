"""The learning rate over a run."""

from __future__ import annotations

import pytest

from student_train.objective.schedules import (
    ALPHA_SCHEDULES,
    LR_SCHEDULES,
    Alpha,
    LearningRate,
    learning_rate,
)


def make(kind: str, num_steps: int = 100) -> LearningRate:
    return learning_rate(
        kind,
        peak=0.01,
        num_steps=num_steps,
        warmup_fraction=0.1,
        decay_fraction=0.2,
        floor=0.1,
    )


@pytest.mark.parametrize("kind", ["wsd", "wsd-sqrt", "cosine"])
def test_it_rises_from_the_first_step_and_ends_at_the_floor(kind: str) -> None:
    rate = make(kind)
    values = [rate.at(step) for step in range(100)]
    assert values[0] == pytest.approx(0.001)
    assert values[9] == max(values) == 0.01
    assert values[-1] == pytest.approx(0.001)
    assert values[:10] == sorted(values[:10])
    assert values[9:] == sorted(values[9:], reverse=True)


def test_wsd_stays_at_the_peak_until_its_decay_and_then_falls_in_a_line() -> None:
    rate = make("wsd")
    assert [rate.at(step) for step in range(10, 80)] == [0.01] * 70
    assert rate.at(89) == pytest.approx(0.01 * (0.1 + 0.9 * 0.5))


def test_a_square_root_falls_by_half_in_a_quarter_of_the_decay() -> None:
    rate = make("wsd-sqrt")
    assert [rate.at(step) for step in range(10, 80)] == [0.01] * 70
    assert rate.at(84) == pytest.approx(0.01 * (0.1 + 0.9 * 0.5))


def test_constant_stays_at_the_peak_after_the_warm_up() -> None:
    rate = make("constant")
    assert rate.at(0) == pytest.approx(0.001)
    assert [rate.at(step) for step in range(10, 100)] == [0.01] * 90


def test_cosine_is_halfway_at_half_of_what_follows_the_warm_up() -> None:
    assert make("cosine").at(54) == pytest.approx(0.01 * (0.1 + 0.9 * 0.5))


@pytest.mark.parametrize("kind", LR_SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_short_runs_have_a_learning_rate_at_every_step(kind: str, num_steps: int) -> None:
    rate = make(kind, num_steps)
    assert all(0 < rate.at(step) <= 0.01 for step in range(num_steps))


def test_a_run_without_decay_ends_at_the_peak() -> None:
    rate = learning_rate(
        "wsd", peak=1.0, num_steps=10, warmup_fraction=0, decay_fraction=0, floor=0
    )
    assert [rate.at(step) for step in range(10)] == [1.0] * 10


def alphas(kind: str, num_steps: int = 100) -> list[float]:
    alpha = Alpha(kind=kind, peak=0.8, num_steps=num_steps, warmup_fraction=0.1, decay_fraction=0.2)
    return [alpha.at(step) for step in range(num_steps)]


def test_alpha_follows_its_schedule() -> None:
    assert alphas("constant") == [0.8] * 100
    assert alphas("linear-increase") == pytest.approx([0.8 * step / 99 for step in range(100)])
    assert alphas("linear-decrease") == pytest.approx(alphas("linear-increase")[::-1])
    assert alphas("period") == ([0.8] * 5 + [0.0] * 5) * 10
    wsd = alphas("wsd")
    assert wsd[:10] == pytest.approx([0.08 * step for step in range(1, 11)])
    assert wsd[10:80] == [0.8] * 70
    assert wsd[80:] == pytest.approx([0.04 * step for step in range(19, -1, -1)])


@pytest.mark.parametrize("kind", ALPHA_SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_alpha_of_short_runs_is_between_nothing_and_its_peak(kind: str, num_steps: int) -> None:
    assert all(0 <= alpha <= 0.8 for alpha in alphas(kind, num_steps))
