"""Top-p-k from the largest entries alone, against the selector on the device and in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.keep import TopPK
from teacher_dump.keep.packed import Selected, unpack
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.selection import selector_of
from teacher_dump.keep.top_logprobs import num_known, select_from_largest
from tests.tiny_teacher import STEP, TAIL_NOISE


def _largest(table: torch.Tensor, k: int) -> tuple[Any, Any]:
    values, ids = table.float().topk(k, -1)
    return ids.to(torch.int32).numpy(), values.numpy()


@settings(max_examples=80, deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 63, 64, 65, 500, 4099]),
    top_k=st.integers(1, 130),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.95, 0.999, 1.0]),
    scale=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    seed=st.integers(0, 2**20),
)
def test_selection_on_the_host_is_that_of_the_device(
    vocab: int, top_k: int, top_p: float, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    keep = Selection(TopPK(top_p=top_p, top_k=min(top_k, vocab), logprob_step=STEP), vocab)
    logits = torch.randn(7, vocab) * scale
    labels = torch.randint(0, vocab, (7,))
    device = unpack(
        selector_of(keep)(logits, labels, torch.zeros(7).long()).numpy(),
        keep,
    )
    table = torch.log_softmax(logits, -1)
    label = table[torch.arange(7), labels].numpy()
    host = select_from_largest(*_largest(table, num_known(keep)), label, keep)
    assert host.entropy is None
    assert (host.label_logprobs == label).all()
    assert host.tail_logmass is not None
    assert not np.isnan(host.tail_logmass).any()
    # noise decides over an entry where the mass of a prefix is top_p
    descending = table.double().exp().sort(-1, descending=True)[0]
    masses = descending.cumsum(-1)
    settled = ((masses - top_p).abs() > 1e-5).all(-1).numpy()
    assert np.array_equal(host.counts[settled], device.counts[settled])
    exact = torch.log_softmax(logits.double(), -1).numpy()
    for t, (ids, logprobs) in enumerate(_by_position(host)):
        assert len(ids) == len(set(ids.tolist()))
        order = list(zip(-logprobs, ids, strict=True))
        assert order == sorted(order)
        assert np.abs(exact[t][ids] - logprobs).max() <= STEP / 2 + 1e-4
        left = np.exp(np.delete(exact[t], ids)).sum()
        assert np.exp(float(host.tail_logmass[t])) == pytest.approx(left, abs=TAIL_NOISE)
        if not 0 < left < 1e-37:  # float32 has hardly a digit there
            assert (host.tail_logmass[t] > -np.inf) == (len(ids) < vocab and left > 0)


def _by_position(selected: Selected) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    borders = np.cumsum(selected.counts)[:-1]
    pieces = zip(np.split(selected.ids, borders), np.split(selected.logprobs, borders), strict=True)
    return list(pieces)


@pytest.mark.parametrize("top_p", [0.95, 1.0])
def test_a_tail_of_a_real_vocabulary_is_as_exact_as_its_float32_softmax(top_p: float) -> None:
    torch.manual_seed(0)
    vocab, num_rows = 49_152, 200
    keep = Selection(TopPK(top_p=top_p, top_k=100, logprob_step=STEP), vocab)
    # from nearly flat to nearly certain, with tails down to about a millionth
    logits = torch.randn(num_rows, vocab) * torch.linspace(0.5, 4.0, num_rows)[:, None]
    logits[:, 7] = logits.logsumexp(-1) + torch.linspace(-5, 14, num_rows)
    table = torch.log_softmax(logits, -1)
    found = select_from_largest(*_largest(table, num_known(keep)), table[:, 0].numpy(), keep)
    exact = torch.softmax(logits.double(), -1).numpy()
    assert found.tail_logmass is not None
    for t, (ids, _) in enumerate(_by_position(found)):
        left = np.delete(exact[t], ids).sum()
        tail = np.exp(float(found.tail_logmass[t]))
        assert tail == pytest.approx(left, abs=3e-5)
        assert left < 1e-3 or np.log(tail / left) == pytest.approx(0, abs=STEP / 2)


def test_a_tail_is_never_below_the_entries_that_are_known_beside_it() -> None:
    # float32 probabilities whose sum is above 1: 1 - sum is negative
    logprobs = np.array([[-1e-7, -15.0, -15.5, -16.0], [0.0, -1.5, -2.0, -40.0]], np.float32)
    ids = np.arange(8, dtype=np.int32).reshape(2, 4)
    keep = Selection(TopPK(top_p=0.5, top_k=3, logprob_step=STEP), 1000)
    found = select_from_largest(ids, logprobs, logprobs[:, 0].copy(), keep)
    assert found.counts.tolist() == [1, 1]
    beside = np.exp(logprobs[:, 1:].astype(np.float64)).sum(-1)
    assert found.tail_logmass is not None
    tail = np.exp(found.tail_logmass.astype(np.float64))
    assert (tail >= beside * (1 - 1e-6)).all()
    assert (tail <= beside + 996 * np.exp(logprobs[:, -1].astype(np.float64)) + 1e-9).all()
