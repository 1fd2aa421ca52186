"""The order of row groups: complete, deterministic, and enterable anywhere."""

from __future__ import annotations

import tracemalloc
from itertools import islice

import pytest

from shards.layout import Layout
from student_train.data.order import START, Order, Position, Window

LAYOUTS = [
    (1, Layout(sequences_per_shard=1, sequences_per_row_group=1)),
    (22, Layout(sequences_per_shard=7, sequences_per_row_group=3)),
    (21, Layout(sequences_per_shard=7, sequences_per_row_group=3)),
    (64, Layout(sequences_per_shard=64, sequences_per_row_group=4)),
    (5, Layout(sequences_per_shard=100, sequences_per_row_group=8)),
    (100, Layout(sequences_per_shard=2, sequences_per_row_group=2)),
    (300, Layout(sequences_per_shard=1, sequences_per_row_group=1)),
]


def order_of(number: int, *, seed: int = 3, window_row_groups: int = 4) -> Order:
    num_sequences, layout = LAYOUTS[number]
    return Order(
        num_sequences=num_sequences,
        layout=layout,
        seed=seed,
        window_row_groups=window_row_groups,
    )


def epochs(order: Order, count: int) -> list[list[Window]]:
    """The windows of the first epochs."""
    found: list[list[Window]] = [[]]
    for window in order.windows(START):
        found[-1].append(window)
        if window.is_last:
            if len(found) == count:
                return found
            found.append([])
    raise AssertionError("windows end")


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_every_row_group_comes_exactly_once_an_epoch_with_its_size(number: int) -> None:
    order = order_of(number)
    layout, num_sequences = order.layout, order.num_sequences
    for windows in epochs(order, 3):
        groups = [g for window in windows for g in window.row_groups]
        assert sorted(groups) == list(range(layout.num_row_groups(num_sequences)))
        sizes = [size for window in windows for size in window.sizes]
        assert sizes == [len(layout.row_group_range(g, num_sequences)) for g in groups]
        assert {len(window.row_groups) for window in windows[:-1]} <= {order.num_members}


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_the_stream_can_be_entered_at_any_window(number: int) -> None:
    order = order_of(number)
    whole = [window for windows in epochs(order, 3) for window in windows]
    position = START
    for first, window in enumerate(whole):
        assert (window.epoch, window.number) == (position.epoch, position.window)
        assert list(islice(order.windows(position), len(whole) - first)) == whole[first:]
        position = window.next_start


def test_seeds_and_epochs_give_other_orders_and_the_same_seed_the_same() -> None:
    first, again, other = (epochs(order_of(6, seed=seed), 2) for seed in (0, 0, 1))
    assert first == again
    groups = [[g for window in windows for g in window.row_groups] for windows in (*first, *other)]
    assert len({tuple(part) for part in groups}) == 4


def test_members_windows_epochs_and_seeds_shuffle_their_rows_in_other_ways() -> None:
    windows = [
        window
        for seed in (0, 1)
        for part in epochs(order_of(3, seed=seed, window_row_groups=8), 2)
        for window in part
    ]
    assert len(windows) == 2 * 2 * 2
    rows = [window.shuffled_lines(member, 30).tolist() for window in windows for member in range(8)]
    assert all(sorted(part) == list(range(30)) for part in rows)
    assert len({tuple(part) for part in rows}) == len(rows)


def test_rows_and_packed_lines_are_shuffled_apart() -> None:
    window = Window(seed=0, epoch=0, number=0, is_last=True, row_groups=(0,), sizes=(30,))
    assert window.shuffled_rows(0).tolist() != window.shuffled_lines(0, 30).tolist()


def test_the_order_of_a_seed_never_changes() -> None:
    window = next(order_of(1, seed=0).windows(Position(epoch=1, window=1, line=0)))
    assert window.row_groups == (4, 5, 0, 2)
    rows = [window.shuffled_rows(member).tolist() for member in range(4)]
    assert rows == [[1, 2, 0], [0], [1, 0, 2], [0]]
    assert window.shuffled_lines(2, 5).tolist() == [2, 4, 3, 0, 1]


def test_a_window_that_no_epoch_has_is_an_error() -> None:
    order = order_of(1)  # ten row groups
    with pytest.raises(ValueError, match="window 3 of 3 in an epoch"):
        next(order.windows(Position(epoch=0, window=3, line=0)))
    with pytest.raises(ValueError, match="windows of 0 row groups"):
        order_of(1, window_row_groups=0)


@pytest.mark.parametrize("window", [0, 123_456])
def test_an_epoch_of_a_million_row_groups_takes_four_bytes_for_each(window: int) -> None:
    layout = Layout(sequences_per_shard=1024, sequences_per_row_group=64)
    order = Order(num_sequences=64_000_000, layout=layout, seed=0, window_row_groups=8)
    tracemalloc.start()
    windows = order.windows(Position(epoch=0, window=window, line=0))
    next(windows)
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert current < 4.1e6
