"""With BOS, every token of the stream is a label exactly once, unless a row begins with it."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_dump.tokens import sequences as module
from teacher_dump.tokens.sequences import cut

BOS = 7


@st.composite
def streams(draw):
    """Documents of tokens among which BOS is frequent, some of a single token."""
    documents = draw(
        st.lists(st.lists(st.sampled_from([1, 2, 3, BOS]), min_size=1, max_size=12), min_size=1)
    )
    tokens = np.array([token for document in documents for token in document], np.uint16)
    starts = np.cumsum([0, *(len(document) for document in documents)])[:-1]
    mask = np.array(draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens))))
    return tokens, starts, draw(st.none() | st.just(mask))


def split_of(stream, length, *, joined):
    tokens, starts, mask = stream
    return cut(
        joined=joined,
        bos_token_id=BOS,
        split="train",
        tokens=tokens,
        document_starts=starts,
        label_mask=mask,
        sequence_length=length,
    )


def stretches(stream, length, *, joined):
    """Begin and end of every stretch, the slow way."""
    tokens, starts, _ = stream
    bounds = [0, len(tokens)] if joined else [*starts.tolist(), len(tokens)]
    for first, stop in itertools.pairwise(bounds):
        for begin in range(first, stop, length):
            yield begin, min(begin + length, stop)


@pytest.mark.parametrize("joined", [True, False])
@given(stream=streams(), length=st.integers(2, 9))
def test_rows_are_bos_and_the_tokens_of_a_stretch(joined, stream, length):
    tokens, starts, mask = stream
    split = split_of(stream, length, joined=joined)
    document = np.searchsorted(starts, np.arange(len(tokens)), side="right") - 1
    expected = []
    for begin, stop in stretches(stream, length, joined=joined):
        inserted = tokens[begin] != BOS
        if stop - begin + inserted < 2:
            continue  # BOS alone predicts nothing
        where = [*([begin] if inserted else []), *range(begin, stop)]
        row = [*([BOS] if inserted else []), *tokens[begin:stop].tolist()]
        counted = np.ones(len(tokens), bool) if mask is None else mask
        expected.append((row, (document[where] - document[begin]).tolist(),
                         counted[where[1:]].tolist()))  # fmt: skip
    assert len(split) == len(expected)
    for number, (row, segments, counted) in enumerate(expected):
        found = split[number]
        assert found.tokens.tolist() == row
        assert len(row) <= length + 1
        assert found.segments.tolist() == segments
        assert found.loss_mask.tolist() == counted
    ends = np.cumsum([0, *(len(row) - 1 for row, _, _ in expected)])
    assert [split.positions_of(n) for n in range(len(split) + 1)] == ends.tolist()
    assert split.num_positions == ends[-1]
    for positions in range(int(ends[-1]) + 2):
        fits = max(n for n in range(len(ends)) if ends[n] <= positions)
        assert ends[split.sequences_within(positions)] == ends[fits]


@pytest.mark.parametrize("joined", [True, False])
def test_counting_by_blocks_is_the_same_as_counting_all(joined, monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 200)
    tokens = rng.choice([1, 2, BOS], lengths.sum()).astype(np.uint16)
    stream = tokens, np.cumsum([0, *lengths[:-1]]), None
    whole = split_of(stream, 8, joined=joined)
    expected = [(whole[n].tokens.tolist(), whole.positions_of(n)) for n in range(len(whole))]
    monkeypatch.setattr(module, "_STRETCHES_PER_MARK", 3)
    monkeypatch.setattr(module, "_DOCUMENTS_PER_BLOCK", 3)
    parts = split_of(stream, 8, joined=joined)
    assert len(parts) == len(whole)
    for number, (row, positions) in enumerate(expected):
        assert parts[number].tokens.tolist() == row
        assert parts.positions_of(number) == positions


@pytest.mark.parametrize("joined", [True, False])
def test_a_row_is_found_by_arithmetic_and_every_label_is_a_label_once(joined):
    tokens = np.arange(1, 101, dtype=np.uint16)
    tokens[tokens == BOS] = 0
    split = split_of((tokens, np.array([0, 40]), None), 16, joined=joined)
    labels = np.concatenate([split[n].tokens[1:] for n in range(len(split))])
    assert sorted(labels.tolist()) == sorted(tokens.tolist())
    if joined:
        assert split[2].tokens.tolist() == [BOS, *range(33, 49)]
