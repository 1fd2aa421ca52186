"""Padding puts each position's entries at the start of its line and no probability beside them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.row_group import RowGroup
from student_train.padding import Run, pad_entries


def entries(counts, offset_type=np.int64):
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(offset_type)
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return offsets, ids, (-ids / 16).astype(np.float32)


def assert_padded(result, counts, ids, logprobs):
    """`counts` of lines; those of no run are 0."""
    start = 0
    for line, count in enumerate(counts):
        kept = slice(start, start + count)
        assert result[0][line, :count].tolist() == ids[kept].tolist()
        assert result[1][line, :count].tolist() == logprobs[kept].tolist()
        assert not result[0][line, count:].any()
        assert (result[1][line, count:] == -np.inf).all()
        start += count


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.data())
def test_every_position_holds_its_entries_and_then_padding(counts, data):
    offsets, ids, logprobs = entries(counts, data.draw(st.sampled_from([np.int32, np.int64])))
    cuts = data.draw(st.lists(st.integers(0, len(counts)), max_size=4).map(sorted))
    runs, lines = [], []
    for first, last in zip([0, *cuts], [*cuts, len(counts)], strict=True):
        lines += [0] * data.draw(st.integers(0, 2))
        runs.append(Run(len(lines), offsets[first : last + 1], ids, logprobs))
        lines += counts[first:last]
    lines += [0] * data.draw(st.integers(0, 2))
    result = pad_entries(runs, len(lines))
    assert result[0].shape == result[1].shape == (len(lines), max(counts))
    assert_padded(result, lines, ids, logprobs)


def test_extreme_values_and_the_sign_of_zero_survive():
    offsets = np.array([0, 3, 3, 5])
    ids = np.array([2**31 - 1, 0, 151_935, 0, 1], np.int32)
    logprobs = np.array([-0.0, -1e-30, -3e38, 0.0, -87.0], np.float32)
    padded_ids, padded_logprobs = pad_entries([Run(0, offsets, ids, logprobs)], 3)
    assert padded_ids[0].tolist() == [2**31 - 1, 0, 151_935]
    assert padded_ids[2, :2].tolist() == [0, 1]
    assert padded_logprobs[0].tobytes() == logprobs[:3].tobytes()
    assert padded_logprobs[2, :2].tobytes() == logprobs[3:].tobytes()


def test_runs_of_different_groups_share_a_rectangle():
    few, many = entries([1, 0]), entries([4, 2, 3])
    ids, logprobs = pad_entries([Run(0, *few), Run(3, *many)], 7)
    assert_padded((ids[:3], logprobs[:3]), [1, 0, 0], *few[1:])
    assert_padded((ids[3:], logprobs[3:]), [4, 2, 3, 0], *many[1:])


def test_nothing_kept_anywhere_gives_rectangles_without_width():
    ids, logprobs = pad_entries([Run(0, *entries([0, 0]))], 2)
    assert (ids.shape, ids.dtype) == ((2, 0), np.int32)
    assert (logprobs.shape, logprobs.dtype) == ((2, 0), np.float32)
    assert pad_entries([], 0)[0].shape == (0, 0)


def test_views_of_read_only_buffers_can_be_padded():
    offsets, ids, logprobs = entries([2, 1])
    ids.flags.writeable = logprobs.flags.writeable = False
    assert_padded(pad_entries([Run(0, offsets, ids, logprobs)], 2), [2, 1], ids, logprobs)


@pytest.mark.parametrize("offsets", [[0, 4], [-1, 2], [0, 3, 2], [2, 1]])
def test_offsets_that_leave_the_entries_are_refused_before_anything_is_read(offsets):
    ids, logprobs = np.zeros(3, np.int32), np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="offsets do not ascend from 0 to at most 3"):
        pad_entries([Run(0, np.array(offsets), ids, logprobs)], 2)


def test_a_run_that_leaves_the_rectangle_is_refused():
    with pytest.raises(ValueError, match="a run ends at line 3 of 2"):
        pad_entries([Run(1, *entries([1, 1]))], 2)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=6))
def test_a_row_group_knows_the_most_entries_of_every_row(rows):
    offsets, ids, logprobs = entries([count for row in rows for count in row])
    positions = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    group = RowGroup(
        sequences=np.arange(len(rows)),
        position_offsets=positions,
        entry_offsets=offsets,
        ids=ids,
        logprobs=logprobs,
    )
    assert group.most_entries.tolist() == [max(row) for row in rows]


@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [-1, 2, 3, 3], [0, 2, 3, 4]])
def test_a_row_group_whose_offsets_leave_its_entries_is_refused(offsets):
    _, ids, logprobs = entries([1, 2])
    group = RowGroup(
        sequences=np.arange(1),
        position_offsets=np.array([0, 3]),
        entry_offsets=np.array(offsets),
        ids=ids,
        logprobs=logprobs,
    )
    with pytest.raises(ValueError, match="do not ascend from 0 to at most 3"):
        _ = group.most_entries
