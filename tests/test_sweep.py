"""A sweep finds what a softmax in float64 says, however many rows it takes at once."""

import pytest
import torch

from teacher_dump import sweep as module
from teacher_dump.groups import GROUP, Workspace
from teacher_dump.sweep import sweep

VOCAB = 5 * GROUP


def logits_of(scale: float) -> torch.Tensor:
    logits = torch.randn(23, VOCAB, generator=torch.Generator().manual_seed(0)) * scale + 30
    logits[3, 17] = 90.0  # all but certain
    logits[5] = 1.5  # flat
    return logits


@pytest.mark.parametrize("thread_bytes", [1, 5 * 4 * VOCAB, 1 << 20])
@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_a_sweep_equals_the_dense_definition(
    scale: float, thread_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_THREAD_BYTES", thread_bytes)
    logits = logits_of(scale)
    before = logits.clone()
    found = sweep(logits, Workspace(VOCAB))
    assert torch.equal(logits, before)

    wide = logits.double()
    logprobs = wide.log_softmax(-1)
    exps = (wide - wide.amax(-1, keepdim=True)).exp()
    near = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(found.exps, exps, **near)
    torch.testing.assert_close(found.total, exps.sum(-1, keepdim=True), **near)
    torch.testing.assert_close(found.log_total, wide.logsumexp(-1), **near)
    torch.testing.assert_close(found.entropy, -(logprobs.exp() * logprobs).sum(-1), **near)
    groups = exps.view(len(logits), -1, GROUP)
    torch.testing.assert_close(found.group_mass, groups.sum(-1), **near)
    assert torch.equal(found.maxima, logits.view(len(logits), -1, GROUP).amax(-1))
    assert (found.entropy >= 0).all()
    assert found.entropy[3] == pytest.approx(float(-(logprobs[3].exp() * logprobs[3]).sum()), 1e-3)


def test_rows_at_once_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(2.0)
    whole = sweep(logits, Workspace(VOCAB))
    monkeypatch.setattr(module, "CPU_THREAD_BYTES", 1)
    for one, other in zip(whole, sweep(logits, Workspace(VOCAB)), strict=True):
        assert torch.equal(one, other)
