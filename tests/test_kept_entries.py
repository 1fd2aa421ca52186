"""Kept entries of a batch: gathered from row groups, and padded for the rows of a block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shards.row_group import RowGroup
from student_train.objective import kept_entries
from student_train.objective.kept_entries import KeptEntries, Run
from tests.kept_entries import all_padded


def run(start: int, counts: list[int], first: int = 1) -> Run:
    """Entries of positions with so many each, all different, ids from `first` on."""
    ids = np.arange(first, first + sum(counts), dtype=np.int32)
    return Run(start, np.array(counts, np.int32), ids, (-ids / 16).astype(np.float32))


def assert_padded(entries: KeptEntries, expected: list[list[tuple[int, float]]]) -> None:
    """`expected` are the entries of every position; padding has ids of theirs, or 0."""
    ids, logprobs = all_padded(entries)
    width = max(map(len, expected), default=0)
    assert ids.shape == logprobs.shape == (len(expected), width)
    assert (ids.dtype, logprobs.dtype) == (torch.int32, torch.float32)
    for position, pairs in enumerate(expected):
        found = list(zip(ids[position].tolist(), logprobs[position].tolist(), strict=True))
        assert found[: len(pairs)] == pairs
        assert logprobs[position, len(pairs) :].tolist() == [-np.inf] * (width - len(pairs))
    known = {0, *(pair[0] for pairs in expected for pair in pairs)}
    assert known.issuperset(ids.flatten().tolist())


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=5), st.data())
def test_every_position_has_its_entries_and_then_padding(
    counts: list[list[int]], data: st.DataObject
) -> None:
    runs: list[Run] = []
    expected: list[list[tuple[int, float]]] = []
    for of_run in counts:
        expected += [[]] * data.draw(st.integers(0, 2))
        runs.append(run(len(expected), of_run, first=1 + 100 * len(runs)))
        pairs = list(zip(runs[-1].ids.tolist(), runs[-1].logprobs.tolist(), strict=True))
        for count in of_run:
            expected.append(pairs[:count])
            del pairs[:count]
    expected += [[]] * data.draw(st.integers(0, 2))
    entries = KeptEntries.gather(runs, len(expected))
    assert entries.max_entries == max((max(of_run, default=0) for of_run in counts), default=0)
    assert_padded(entries, expected)


def test_rows_are_padded_in_the_order_asked_for() -> None:
    entries = KeptEntries.gather([run(0, [2, 0, 3, 1])], 4)
    whole = all_padded(entries)
    rows = torch.tensor([3, 0, 3, 1])
    for found, expected in zip(entries.padded(rows), whole, strict=True):
        assert torch.equal(found, expected[rows])
    assert entries.padded(rows[:0])[0].shape == (0, 3)


@pytest.mark.parametrize("places", [1, 12, 18, 1000])  # a block of two or three rows has 6 or 9
def test_blocks_are_padded_like_each_alone(places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_entries, "_PLACES_AT_ONCE", places)
    entries = KeptEntries.gather([run(0, [2, 0, 3, 1, 0, 2, 1])], 7)
    blocks = torch.tensor([6, 0, 3, 1, 2]).tensor_split(3)
    for block, found in zip(blocks, entries.padded_blocks(blocks), strict=True):
        assert all(map(torch.equal, found, entries.padded(block)))
    assert list(entries.padded_blocks([])) == []


def test_padding_leaves_the_entries_as_they_are() -> None:
    entries = KeptEntries.gather([run(0, [2, 0, 3])], 3)
    before = [tensor.clone() for tensor in entries[:3]]
    all_padded(entries)
    assert all(map(torch.equal, entries[:3], before))


def test_extreme_values_and_the_sign_of_zero_survive() -> None:
    counts = np.array([3, 0, 2])
    ids = np.array([2**31 - 1, 0, 151_935, 0, 1], np.int32)
    logprobs = np.array([-0.0, -1e-30, -3e38, 0.0, -87.0], np.float32)
    found_ids, found = all_padded(KeptEntries.gather([Run(0, counts, ids, logprobs)], 3))
    assert found_ids[0].tolist() == [2**31 - 1, 0, 151_935]
    assert found_ids[2, :2].tolist() == [0, 1]
    assert found[0].numpy().tobytes() == logprobs[:3].tobytes()
    assert found[2, :2].numpy().tobytes() == logprobs[3:].tobytes()


@pytest.mark.parametrize("runs", [[], [run(0, [0, 0])]])
def test_nothing_kept_anywhere_gives_rectangles_without_width(runs: list[Run]) -> None:
    assert_padded(KeptEntries.gather(runs, 2), [[], []])


def test_views_of_read_only_buffers_can_be_gathered() -> None:
    one = run(0, [2, 1])
    for array in one[1:]:
        array.flags.writeable = False
    assert KeptEntries.gather([one], 2).ids[:3].tolist() == one.ids.tolist()


@pytest.mark.parametrize("column", ["ids", "logprobs"])
def test_counts_that_do_not_fit_the_entries_are_refused(column: str) -> None:
    one = run(0, [2, 1])
    for wrong in (getattr(one, column)[:2], np.tile(getattr(one, column), 2)):
        with pytest.raises(ValueError, match="counts of 3 entries, but"):
            KeptEntries.gather([one._replace(**{column: wrong})], 2)


def test_a_run_that_leaves_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="could not broadcast"):
        KeptEntries.gather([run(1, [1, 1])], 2)


@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [-1, 2, 3, 3], [0, 2, 3, 4]])
def test_a_row_group_whose_offsets_leave_its_entries_is_refused(offsets: list[int]) -> None:
    group = RowGroup(
        sequences=np.arange(1),
        position_offsets=np.array([0, 3]),
        entry_offsets=np.array(offsets),
        ids=np.zeros(3, np.int32),
        logprobs=np.zeros(3, np.float32),
    )
    with pytest.raises(ValueError, match="do not ascend from 0 to at most 3"):
        _ = group.entry_counts
