"""Padding puts each position's entries at the start of its row and nothing else beside them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import padding
from shards.padding import empty_entries, pad_entries


def entries(counts):
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return offsets, ids, (-ids / 16).astype(np.float32)


def assert_padded(result, counts, ids, logprobs):
    start = 0
    for row, count in enumerate(counts):
        for padded, values, filler in zip(result, (ids, logprobs), (0, -np.inf), strict=True):
            assert padded[row, :count].tolist() == values[start : start + count].tolist()
            assert (padded[row, count:] == filler).all()
        start += count


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 5), st.integers(1, 40))
def test_every_position_holds_its_entries_and_then_padding(counts, extra, block_values):
    offsets, ids, logprobs = entries(counts)
    width = max(counts) + extra
    out = np.full((len(counts), width), 7, np.int32), np.full((len(counts), width), 7, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padding, "_BLOCK_VALUES", block_values)
        result = pad_entries(offsets, ids, logprobs, out)
    assert result[0] is out[0]
    assert result[1] is out[1]
    assert_padded(result, counts, ids, logprobs)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30), st.data())
def test_some_positions_of_a_group_are_padded_as_they_are_in_all_of_it(counts, data):
    first = data.draw(st.integers(0, len(counts) - 1))
    last = data.draw(st.integers(first, len(counts)))
    offsets, ids, logprobs = entries(counts)
    result = pad_entries(offsets[first : last + 1], ids, logprobs)
    kept = slice(offsets[first], offsets[last])
    assert result[0].shape == (last - first, max(counts[first:last], default=0))
    assert_padded(result, counts[first:last], ids[kept], logprobs[kept])


def test_extreme_values_and_the_sign_of_zero_survive():
    offsets = np.array([0, 3, 3, 5])
    ids = np.array([2**31 - 1, 0, 151_935, 0, 1], np.int32)
    logprobs = np.array([-0.0, -1e-30, -3e38, 0.0, -87.0], np.float32)
    padded_ids, padded_logprobs = pad_entries(offsets, ids, logprobs)
    assert padded_ids.tolist() == [[2**31 - 1, 0, 151_935], [0, 0, 0], [0, 1, 0]]
    assert padded_logprobs[0].tobytes() == logprobs[:3].tobytes()
    assert padded_logprobs[2, :2].tobytes() == logprobs[3:].tobytes()


def test_fresh_rectangles_can_be_written_in_parts():
    ids, logprobs = empty_entries((2, 3, 4))
    assert (ids.dtype, logprobs.dtype) == (np.int32, np.float32)
    for b in range(2):
        pad_entries(*entries([4, 0, b]), (ids[b], logprobs[b]))
        assert_padded((ids[b], logprobs[b]), [4, 0, b], *entries([4, 0, b])[1:])
    assert empty_entries((0, 5))[0].shape == (0, 5)


def test_views_of_read_only_buffers_can_be_padded():
    offsets, ids, logprobs = entries([2, 1])
    ids.flags.writeable = logprobs.flags.writeable = False
    assert_padded(pad_entries(offsets, ids, logprobs), [2, 1], ids, logprobs)


def test_a_width_that_is_too_small_is_refused():
    out = np.empty((2, 3), np.int32), np.empty((2, 3), np.float32)
    with pytest.raises(ValueError, match="4 entries does not fit a width of 3"):
        pad_entries(*entries([4, 1]), out)
