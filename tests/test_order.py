"""The order of sequences: complete, deterministic, and enterable anywhere."""

from __future__ import annotations

import tracemalloc
from itertools import islice, pairwise

import pytest

from shards.layout import Layout
from student_train.data.order import Order

LAYOUTS = [
    (1, Layout(sequences_per_shard=1, sequences_per_row_group=1)),
    (22, Layout(sequences_per_shard=7, sequences_per_row_group=3)),
    (21, Layout(sequences_per_shard=7, sequences_per_row_group=3)),
    (64, Layout(sequences_per_shard=64, sequences_per_row_group=4)),
    (5, Layout(sequences_per_shard=100, sequences_per_row_group=8)),
    (100, Layout(sequences_per_shard=2, sequences_per_row_group=2)),
    (5, Layout(sequences_per_shard=1000, sequences_per_row_group=2)),
    (300, Layout(sequences_per_shard=1, sequences_per_row_group=1)),
]


def stream(order: Order, start: int, count: int) -> list[int]:
    """The numbers of `count` sequences from the position `start` on."""

    def sequences():  # type: ignore[no-untyped-def]
        for window in order.windows(start):
            for member, offset in window.picks[window.skip :].tolist():
                group = order.layout.row_group_range(window.row_groups[member], order.num_sequences)
                yield group[offset]

    return list(islice(sequences(), count))


@pytest.mark.parametrize(("num_sequences", "layout"), LAYOUTS)
def test_every_sequence_comes_exactly_once_an_epoch(num_sequences: int, layout: Layout) -> None:
    order = Order(num_sequences=num_sequences, layout=layout, seed=3)
    found = stream(order, 0, 3 * num_sequences)
    for epoch in range(3):
        part = found[epoch * num_sequences : (epoch + 1) * num_sequences]
        assert sorted(part) == list(range(num_sequences))


@pytest.mark.parametrize(("num_sequences", "layout"), LAYOUTS)
def test_the_stream_can_be_entered_at_any_position(num_sequences: int, layout: Layout) -> None:
    order = Order(num_sequences=num_sequences, layout=layout, seed=3)
    whole = stream(order, 0, 3 * num_sequences)
    for start in range(2 * num_sequences):
        assert stream(order, start, num_sequences) == whole[start : start + num_sequences]


def test_seeds_and_epochs_give_other_orders_and_the_same_seed_the_same() -> None:
    num_sequences, layout = LAYOUTS[3]
    orders = [Order(num_sequences=num_sequences, layout=layout, seed=seed) for seed in (0, 1, 0)]
    first, other, again = (stream(order, 0, 128) for order in orders)
    assert first == again
    assert first != other
    assert first[:64] != first[64:]


def test_the_order_of_a_seed_never_changes() -> None:
    num_sequences, layout = LAYOUTS[1]
    found = stream(Order(num_sequences=num_sequences, layout=layout, seed=0), 20, 10)
    assert found == [21, 13, 3, 11, 12, 18, 5, 4, 13, 19]


def test_sequences_that_are_neighbours_on_disk_are_spread_over_a_window() -> None:
    num_sequences, layout = LAYOUTS[3]
    found = stream(Order(num_sequences=num_sequences, layout=layout, seed=0), 0, 64)
    followed = sum(b == a + 1 for a, b in pairwise(found))
    assert followed < 16


@pytest.mark.parametrize("start", [0, 123_456_789])
def test_an_epoch_of_a_million_row_groups_takes_four_bytes_for_each(start: int) -> None:
    layout = Layout(sequences_per_shard=1024, sequences_per_row_group=64)
    order = Order(num_sequences=64_000_000, layout=layout, seed=0)
    tracemalloc.start()
    windows = order.windows(start)
    next(windows)
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert current < 4.1e6
