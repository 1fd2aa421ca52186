"""A sweep finds what a softmax in float64 says, however many rows it takes at once."""

import math

import numpy as np
import pytest
import torch

from shards.keep import Draws, Threshold, TopPK
from teacher_dump.keep import selection
from teacher_dump.keep import sweep as module
from teacher_dump.keep.groups import GROUP, MEMBERS
from teacher_dump.keep.packed import unpack
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.selection import rows_at_once, select_in_blocks, selector_of

VOCAB = 5 * GROUP


def logits_of(scale: float) -> torch.Tensor:
    logits = torch.randn(23, VOCAB, generator=torch.Generator().manual_seed(0)) * scale + 30
    logits[3, 17] = 50.0  # all but certain
    logits[5] = 1.5  # flat
    return logits


def compile_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All passes, and without an alternative."""

    def refuse(logits: torch.Tensor) -> int:
        raise AssertionError("it was not compiled")

    monkeypatch.setattr(module, "WORTH_COMPILING", 0)
    monkeypatch.setattr(module, "_rows_of_part", refuse)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile warns within
@pytest.mark.parametrize("by_sets", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 100, "compiled"])
@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_a_sweep_equals_the_dense_definition(
    scale: float, rows: int | str, by_sets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows == "compiled":
        compile_at_once(monkeypatch)
    else:
        monkeypatch.setattr(module, "_rows_of_part", lambda logits: rows)
    logits = logits_of(scale)
    before = logits.clone()
    found = module.Sweeper(by_sets=by_sets)(logits)
    assert torch.equal(logits, before)

    wide = logits.double()
    logprobs = wide.log_softmax(-1)
    exps = (wide - wide.amax(-1, keepdim=True)).exp()
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    near = {"rtol": 2e-6, "atol": 0.0, "check_dtype": False}
    torch.testing.assert_close(found.mass(logits), exps, **near)
    torch.testing.assert_close(found.total, exps.sum(-1, keepdim=True), **near)
    torch.testing.assert_close(found.log_total, wide.logsumexp(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.entropy, entropy, rtol=0, atol=2e-6)
    groups = exps.view(len(logits), -1, GROUP)
    sets = torch.stack([exps[:, i :: VOCAB // MEMBERS] for i in range(VOCAB // MEMBERS)], 1)
    torch.testing.assert_close(found.part_mass, (sets if by_sets else groups).sum(-1), **near)
    sets = torch.stack([logits[:, i :: VOCAB // MEMBERS] for i in range(VOCAB // MEMBERS)], 1)
    assert torch.equal(found.maxima, sets.amax(-1))
    # next to nothing, and not lost beside a logit of 50, whose last bit is 4e-6
    assert 1e-6 < entropy[3] < 1e-2
    torch.testing.assert_close(found.entropy[3], entropy[3], rtol=0, atol=3e-7)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile warns within
def test_parts_of_a_block_do_not_change_what_is_selected(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a smaller block before: buffers are used again, at another temperature too."""
    logits, labels = logits_of(2.0), torch.arange(23)
    keys = 12345 * torch.arange(1, 24)
    for method in (
        TopPK(top_p=1.0, top_k=30),
        Draws(draws=20, temperature=2.0),
        Threshold(threshold=math.exp(-30 / 16), temperature=0.5),
    ):
        keep = Selection(method, VOCAB - 3)
        monkeypatch.setattr(module, "_rows_of_part", lambda logits: 100)
        whole = selector_of(keep)(logits, labels, keys)
        with monkeypatch.context() as patched:
            patched.setattr(module, "_rows_of_part", lambda logits: 4)
            if compiled:
                compile_at_once(patched)
            select = selector_of(keep)
            select(logits[:2], labels[:2], keys[:2])
            parts = select_in_blocks(select, logits, labels, keys, rows=10)
        expected, found = unpack(whole.numpy(), keep), unpack(parts.numpy(), keep)
        np.testing.assert_array_equal(found.counts, expected.counts)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-6)
        np.testing.assert_allclose(found.entropy, expected.entropy, atol=1e-5)
        np.testing.assert_allclose(found.label_logprobs, expected.label_logprobs, atol=1e-5)
        exact = logits[:, : VOCAB - 3].double().log_softmax(-1)
        np.testing.assert_allclose(found.label_logprobs, exact[torch.arange(23), labels], atol=1e-5)
        np.testing.assert_allclose(found.entropy, -(exact.exp() * exact).sum(-1), atol=1e-5)


def test_blocks_are_sized_by_the_memory_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Selection(TopPK(top_p=0.9, top_k=3, logprob_step=1 / 16), VOCAB)
    monkeypatch.setattr(selection, "CPU_SELECTION_BYTES", 7 * 4 * 3 * GROUP * 3 + 1)
    for dtype in (torch.float32, torch.bfloat16):
        assert rows_at_once(torch.zeros((2, VOCAB), dtype=dtype), keep) == 7
    assert rows_at_once(torch.zeros((2, 10 * VOCAB)), keep) == 1
    logits, labels = logits_of(2.0), torch.arange(23)
    blocks = select_in_blocks(selector_of(keep), logits, labels, labels)
    assert torch.equal(
        blocks,
        select_in_blocks(selector_of(keep), logits, labels, labels, 7),
    )
    assert len(blocks) == 23
