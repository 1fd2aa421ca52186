"""Top-p-k against a dense float64 reference, over sizes that fit no block and no group."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.keep import TopPK
from teacher_dump.keep.packed import round_to_step, unpack
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.selection import selector_of

STEP = 1 / 16


def _select(logits: torch.Tensor, labels: torch.Tensor, keep: Selection):  # type: ignore[no-untyped-def]
    selected = unpack(
        selector_of(keep)(logits, labels, torch.zeros_like(labels)).numpy(),
        keep,
    )
    borders = np.concatenate([[0], np.cumsum(selected.counts)])
    rows = [
        (selected.ids[a:b].astype(np.int64), selected.logprobs[a:b])
        for a, b in itertools.pairwise(borders)
    ]
    return selected, rows


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 63, 64, 65, 127, 500, 4099]),
    padding=st.integers(0, 70),
    top_k=st.integers(1, 130),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.95, 0.999, 1.0]),
    scale=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    seed=st.integers(0, 2**20),
)
def test_selection_equals_the_dense_definition(vocab, padding, top_k, top_p, scale, seed):  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    top_k = min(top_k, vocab)
    logits = torch.randn(7, vocab + padding) * scale
    logits[:, vocab:] = 50.0  # padded rows that must not exist
    labels = torch.randint(0, vocab, (7,))
    keep = Selection(TopPK(top_p=top_p, top_k=top_k, logprob_step=STEP), vocab)
    selected, rows = _select(logits, labels, keep)
    exact = torch.log_softmax(logits[:, :vocab].double(), -1)
    for t, (ids, logprobs) in enumerate(rows):
        descending = exact[t].sort(descending=True)[0]
        masses = descending.exp().cumsum(0)
        # the smallest prefix that reaches top_p, wherever rounding cannot decide it either way
        low = int((masses < top_p - 1e-5).sum()) + 1
        high = int((masses < top_p + 1e-5).sum()) + 1
        assert min(low, top_k) <= len(ids) <= min(high, top_k, vocab)
        assert len(set(ids.tolist())) == len(ids)
        assert ids.max() < vocab
        true = exact[t].numpy()[ids]
        assert np.abs(true - logprobs).max() <= STEP / 2 + 1e-4
        assert true.min() >= descending[len(ids) - 1] - 1e-4  # nothing larger was left out
        order = list(zip(-logprobs, ids, strict=True))
        assert order == sorted(order)
        left = np.delete(exact[t].numpy(), ids)
        if left.size:
            assert (
                selected.tail_logmass[t]
                == pytest.approx(np.logaddexp.reduce(left), abs=1e-3, rel=1e-4)
                or np.logaddexp.reduce(left) < -80
            )
        assert selected.label_logprobs[t] == pytest.approx(exact[t, labels[t]].item(), abs=1e-3)
        entropy = -(exact[t].exp() * exact[t]).sum().item()
        assert selected.entropy[t] == pytest.approx(entropy, abs=1e-3)


def test_a_tail_of_a_hundred_millionth_is_measured_and_not_lost_in_one_minus_the_rest() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 17] = 25.0
    keep = Selection(TopPK(top_p=0.95, top_k=10, logprob_step=STEP), 1000)
    selected, rows = _select(logits, torch.tensor([3]), keep)
    assert rows[0][0].tolist() == [17]
    exact = np.log(999) - np.logaddexp(25.0, np.log(999))
    assert selected.tail_logmass[0] == pytest.approx(exact, abs=1e-3)


def test_equal_logprobs_stand_by_ascending_id() -> None:
    keep = Selection(TopPK(top_p=0.9, top_k=64, logprob_step=STEP), 64)
    _, rows = _select(torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64), keep)
    for ids, _ in rows:
        assert ids.tolist() == sorted(ids.tolist())


def test_a_result_of_the_wrong_shape_or_with_an_impossible_count_is_refused() -> None:
    keep = Selection(TopPK(top_p=0.9, top_k=4, logprob_step=STEP), 64)
    with pytest.raises(ValueError, match="expected"):
        unpack(np.zeros((3, 5), np.int32), keep)
    with pytest.raises(ValueError, match="counts"):
        unpack(np.zeros((3, keep.width), np.int32), keep)


def test_rounding_goes_to_the_nearest_step_and_keeps_an_empty_tail() -> None:
    values = np.array([-0.03, -0.04, -1.0, -np.inf], np.float32)
    assert round_to_step(values, STEP).tolist() == [0.0, -0.0625, -1.0, -np.inf]
