"""Which rank takes which line when: the same global order for any number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, repeat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.layout import Layout
from student_train.data.mixture import choices
from student_train.data.order import START, Order, Position, Window
from student_train.data.packing import pack
from student_train.data.plan import (
    DealtLine,
    Step,
    deal,
    dealt_lines,
    how_to_even_out,
    members_of,
    plan_steps,
    ranks_of,
    split_evenly,
)

LENGTH = 16
Place = tuple[int, int, int, int]  # dataset, epoch, row group, line of it


class Data:
    """Datasets without files: orders, and how many lines the members of a window have."""

    def __init__(self, orders: Sequence[Order], packed: Sequence[bool], seed: int) -> None:
        self.orders = orders
        self.packed = packed
        self.weights = [1.0 + number for number in range(len(orders))]
        self.seed = seed

    def num_lines(self, dataset: int, window: Window) -> list[int]:
        """Of every member; packed ones by lengths that depend on the row group alone."""
        if not self.packed[dataset]:
            return list(window.sizes)
        return [
            len(pack(np.random.default_rng((dataset, g)).integers(1, LENGTH + 1, size), LENGTH))
            for g, size in zip(window.row_groups, window.sizes, strict=True)
        ]

    def steps(
        self,
        rank: int,
        world_size: int,
        *,
        step_lines: int,
        micro_batch_lines: int = 3,
        done: int = 0,
        positions: Sequence[Position] | None = None,
    ) -> Iterator[Step]:
        """The steps of a rank after `done` of them."""
        starts = positions or [START] * len(self.orders)
        streams = [
            dealt_lines(order, start, lambda w, d=dataset: self.num_lines(d, w), world_size)  # type: ignore[misc]
            for dataset, (order, start) in enumerate(zip(self.orders, starts, strict=True))
        ]
        chosen = choices(self.weights, seed=self.seed, first_line=done * step_lines)
        return plan_steps(
            streams,
            starts,
            chosen,
            step_lines=step_lines,
            micro_batch_lines=micro_batch_lines,
            rank=rank,
            world_size=world_size,
        )


@st.composite
def datas(draw: st.DrawFn) -> Data:
    """One to three datasets of 1 to 60 sequences, some with packed lines."""
    orders, packed = [], []
    seed = draw(st.integers(0, 2**63 - 1))
    for number in range(draw(st.integers(1, 3))):
        per_row_group = draw(st.integers(1, 6))
        layout = Layout(
            sequences_per_shard=draw(st.integers(per_row_group, 20)),
            sequences_per_row_group=per_row_group,
        )
        orders.append(
            Order(
                num_sequences=draw(st.integers(1, 60)),
                layout=layout,
                seed=seed + number,
                window_row_groups=draw(st.integers(1, 10)),
            )
        )
        packed.append(draw(st.booleans()))
    return Data(orders, packed, seed)


def place(dataset: int, line: DealtLine) -> Place:
    window = line.window
    return dataset, window.epoch, window.row_groups[line.member], line.line_of_member


def places(step: Step) -> list[Place]:
    """What a rank takes in a step."""
    return [place(pick.dataset, pick.line) for batch in step.micro_batches for pick in batch]


@settings(deadline=None, max_examples=40)
@given(data=datas(), world_size=st.integers(1, 12), step_lines=st.integers(1, 20))
def test_the_ranks_of_a_step_take_together_what_one_process_takes(
    data: Data, world_size: int, step_lines: int
) -> None:
    alone = data.steps(0, 1, step_lines=step_lines)
    ranks = [data.steps(rank, world_size, step_lines=step_lines) for rank in range(world_size)]
    for expected, *found in islice(zip(alone, *ranks, strict=True), 8):
        whole = places(expected)
        assert len(whole) == step_lines
        parts = [places(step) for step in found]
        for part in parts:  # in the order of all
            assert part == [line for line in whole if line in set(part)]
        assert Counter(line for part in parts for line in part) == Counter(whole)
        assert {step.positions for step in found} == {expected.positions}


@settings(deadline=None, max_examples=40)
@given(data=datas(), world_size=st.integers(1, 12), step_lines=st.integers(1, 40))
def test_all_ranks_make_the_same_number_of_micro_batches_and_empty_ones_come_last(
    data: Data, world_size: int, step_lines: int
) -> None:
    ranks = [
        data.steps(rank, world_size, step_lines=step_lines, micro_batch_lines=3)
        for rank in range(world_size)
    ]
    for steps in islice(zip(*ranks, strict=True), 5):
        sizes = [[len(batch) for batch in step.micro_batches] for step in steps]
        most = max(sum(part) for part in sizes)
        assert {len(part) for part in sizes} == {-(-most // 3)}
        for part in sizes:
            assert max(part) <= 3
            assert max(part) - min(part) <= 1
            assert part == sorted(part, reverse=True)


@settings(deadline=None, max_examples=40)
@given(
    data=datas(),
    step_lines=st.integers(1, 20),
    worlds=st.sampled_from([(8, 2, 8), (3, 5), (1, 30), (7, 1, 2)]),
)
def test_a_run_goes_on_exactly_with_another_number_of_ranks(
    data: Data, step_lines: int, worlds: tuple[int, ...]
) -> None:
    alone = data.steps(0, 1, step_lines=step_lines)
    positions: Sequence[Position] | None = None
    done = 0
    for world_size in worlds:
        ranks = [
            data.steps(rank, world_size, step_lines=step_lines, done=done, positions=positions)
            for rank in range(world_size)
        ]
        for _ in range(3):
            expected, found = next(alone), [next(steps) for steps in ranks]
            together = Counter(line for step in found for line in places(step))
            assert together == Counter(places(expected))
            assert {step.positions for step in found} == {expected.positions}
            positions = found[0].positions
            done += 1


@settings(deadline=None, max_examples=40)
@given(data=datas(), world_size=st.integers(1, 70))
def test_every_line_comes_exactly_once_an_epoch(data: Data, world_size: int) -> None:
    order = data.orders[0]
    lines = dealt_lines(order, START, lambda window: data.num_lines(0, window), world_size)
    seen: Counter[Place] = Counter()
    expected: Counter[Place] = Counter()
    window = None
    for line in lines:
        if line.window != window:
            window = line.window
            if window.epoch == 2:
                break
            for member, count in enumerate(data.num_lines(0, window)):
                for number in range(count):
                    expected[0, window.epoch, window.row_groups[member], number] += 1
        seen[place(0, line)] += 1
    assert seen == expected
    assert set(seen.values()) == {1}
    assert len({place[2] for place in seen}) == order.layout.num_row_groups(order.num_sequences)


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_lines_are_dealt_in_turn_over_the_members_that_have_some_left(counts: list[int]) -> None:
    members, lines = (part.tolist() for part in deal(counts))
    expected = [
        (member, line)
        for line in range(max(counts))
        for member in range(len(counts))
        if line < counts[member]
    ]
    assert list(zip(members, lines, strict=True)) == expected


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=9), world_size=st.integers(1, 40))
def test_a_rank_takes_lines_of_its_own_members_alone(counts: list[int], world_size: int) -> None:
    members, lines = deal(counts)
    ranks = ranks_of(members, lines, len(counts), world_size)
    assert ((ranks >= 0) & (ranks < world_size)).all()
    for rank in range(world_size):
        own = list(members_of(rank, len(counts), world_size))
        assert set(members[ranks == rank].tolist()) <= set(own)
        assert all(m % world_size == rank for m in own) or world_size > len(counts)
    for member, count in enumerate(counts):
        readers = [r for r in range(world_size) if member in members_of(r, len(counts), world_size)]
        taken = Counter(ranks[members == member].tolist())
        assert set(taken) <= set(readers)
        parts = [taken[reader] for reader in readers]
        assert sum(parts) == count
        assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_that_divide_a_window_take_equal_parts_and_read_nothing_twice(
    world_size: int,
) -> None:
    members, lines = deal([5] * 8)
    ranks = ranks_of(members, lines, 8, world_size)
    for first in range(0, 40, world_size):
        assert sorted(ranks[first : first + world_size].tolist()) == list(range(world_size))
    read = [member for rank in range(world_size) for member in members_of(rank, 8, world_size)]
    assert sorted(read) == list(range(8))


def test_micro_batches_of_a_step_are_even() -> None:
    assert [len(part) for part in split_evenly(range(33), 5)] == [7, 7, 7, 6, 6]
    assert [len(part) for part in split_evenly(range(2), 4)] == [1, 1, 0, 0]
    assert [len(part) for part in split_evenly(range(16), 2)] == [8, 8]


def test_a_dataset_that_has_no_line_in_a_step_stays_where_it_is() -> None:
    layout = Layout(sequences_per_shard=4, sequences_per_row_group=2)
    order = Order(num_sequences=8, layout=layout, seed=0, window_row_groups=2)
    stands = [Position(epoch=0, window=1, line=2), Position(epoch=3, window=0, line=1)]
    lines = [dealt_lines(order, start, lambda w: w.sizes, 1) for start in stands]
    steps = plan_steps(
        lines, stands, repeat(0), step_lines=3, micro_batch_lines=3, rank=0, world_size=1
    )
    assert next(steps).positions == (Position(epoch=1, window=0, line=1), stands[1])


def test_a_line_that_no_window_has_is_an_error() -> None:
    layout = Layout(sequences_per_shard=4, sequences_per_row_group=2)
    order = Order(num_sequences=8, layout=layout, seed=0, window_row_groups=2)
    with pytest.raises(ValueError, match="line 4 of 4 in window 1"):
        next(dealt_lines(order, Position(epoch=0, window=1, line=4), lambda w: w.sizes, 1))


@pytest.mark.parametrize(
    ("members", "groups", "ranks", "expected"),
    [
        (8, 100, 1, None),
        (8, 100, 4, None),
        (8, 100, 8, None),
        (8, 100, 3, "some ranks get more lines than others; --window-row-groups 9 avoids"),
        (8, 100, 16, "several ranks read the same row group; --window-row-groups 16 avoids"),
        (8, 100, 12, "several ranks read the same row group; --window-row-groups 12 avoids"),
        (5, 5, 8, "8 ranks read 5 row groups, so some ranks get more lines"),
        (8, 12, 16, "16 ranks read 12 row groups"),
    ],
)
def test_the_start_says_which_window_divides_evenly(
    members: int, groups: int, ranks: int, expected: str | None
) -> None:
    found = how_to_even_out(members, groups, ranks)
    assert found is None if expected is None else found is not None and expected in found
