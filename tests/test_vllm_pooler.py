"""The pooler against both shapes of vLLM's metadata, in pieces, after a preemption, with a gap.

vLLM's own `PoolingMetadata` and cursor are used, as its two model runners build them: the one of
the CPU hands over the prompt's ids on the device, the one of the GPU none at all.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from shards.keep import Threshold, TopPK
from teacher_dump.keep.packed import unpack
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.random_keys import sequence_key

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports warn of their own accord
    from vllm.pooling_params import PoolingParams
    from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

    from teacher_dump.engines import vllm_pooler
    from teacher_dump.engines.vllm_pooler import LABELS_KEY, RANDOM_KEY, TeacherPooler

VOCAB, HIDDEN = 97, 8
KEEP = Selection(TopPK(top_p=0.9, top_k=5, logprob_step=1 / 16), VOCAB)


class _Requests:
    """Prompts with their hidden states, fed to a pooler in pieces as a model runner would."""

    def __init__(self, lengths: list[int], *, ids_on_device: bool, keep: Selection = KEEP) -> None:
        torch.manual_seed(0)
        self.head = torch.randn(VOCAB + 3, HIDDEN)  # three padded rows
        self.hidden = [torch.randn(length, HIDDEN) for length in lengths]
        self.labels = [torch.randint(0, VOCAB, (length,)) for length in lengths]
        self.states = [PoolingStates() for _ in lengths]
        self.ids_on_device = ids_on_device
        self.pooler = TeacherPooler(lambda hidden: hidden @ self.head.T, keep)

    def step(self, starts: list[int], stops: list[int]) -> list[torch.Tensor | None]:
        params = [
            PoolingParams(
                task="token_classify",
                extra_kwargs={
                    LABELS_KEY: labels.to(torch.int32).numpy().tobytes(),
                    RANDOM_KEY: sequence_key(0, "train", number),
                },
            )
            for number, labels in enumerate(self.labels)
        ]
        lengths = torch.tensor([len(hidden) for hidden in self.hidden])
        ids = torch.zeros((len(lengths), int(lengths.max())), dtype=torch.int64)
        metadata = PoolingMetadata(
            prompt_lens=lengths,
            prompt_token_ids=ids if self.ids_on_device else None,
            prompt_token_ids_cpu=None,
            pooling_params=params,
            pooling_states=self.states,
        )
        metadata.build_pooling_cursor(
            np.array([b - a for a, b in zip(starts, stops, strict=True)], dtype=np.int32),
            torch.tensor(stops),
            device=torch.device("cpu"),
        )
        pieces = [h[a:b] for h, a, b in zip(self.hidden, starts, stops, strict=True)]
        result: list[torch.Tensor | None] = self.pooler(torch.cat(pieces), metadata)
        return result

    def check(self, request: int, packed: Any) -> None:
        """A finished request is what the dense softmax of its hidden states says."""
        selected = unpack(packed.numpy(), KEEP)
        exact = torch.log_softmax((self.hidden[request] @ self.head.T)[:, :VOCAB].double(), -1)
        wanted = exact[torch.arange(len(exact)), self.labels[request]].numpy()
        assert selected.label_logprobs == pytest.approx(wanted, abs=1e-4)
        first = np.cumsum(selected.counts) - selected.counts
        assert np.array_equal(selected.ids[first], exact.argmax(-1).numpy())


@pytest.mark.parametrize("ids_on_device", [True, False])
def test_whole_prompts_come_back_in_one_step(ids_on_device: bool) -> None:
    requests = _Requests([5, 1, 9], ids_on_device=ids_on_device)
    for number, packed in enumerate(requests.step([0, 0, 0], [5, 1, 9])):
        requests.check(number, packed)


@pytest.mark.parametrize("ids_on_device", [True, False])
def test_a_prompt_in_pieces_comes_back_whole_at_its_end(ids_on_device: bool) -> None:
    requests = _Requests([7, 4], ids_on_device=ids_on_device)
    first = requests.step([0, 0], [3, 4])
    assert first[0] is None
    requests.check(1, first[1])
    requests.states[1].clean()
    second = requests.step([3, 0], [7, 4])
    requests.check(0, second[0])


def test_a_preempted_prompt_starts_again_and_keeps_no_old_piece() -> None:
    requests = _Requests([6], ids_on_device=False)
    assert requests.step([0], [4]) == [None]
    assert requests.step([0], [2]) == [None]
    requests.check(0, requests.step([2], [6])[0])


def test_a_gap_as_a_prefix_cache_leaves_it_is_an_error() -> None:
    requests = _Requests([6], ids_on_device=False)
    with pytest.raises(RuntimeError, match="is prefix caching on"):
        requests.step([2], [6])


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = _Requests([50], ids_on_device=False)
    whole = requests.step([0], [50])[0]
    monkeypatch.setattr(vllm_pooler, "block_rows", lambda device, vocab_size: 7)
    blocks = requests.step([0], [50])[0]
    assert whole is not None
    assert blocks is not None
    assert torch.equal(whole[:, 0], blocks[:, 0])
    requests.check(0, blocks)


def test_what_is_random_belongs_to_the_position_however_the_prompt_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep = Selection(Threshold(threshold=math.exp(-1.5)), VOCAB)
    lengths = [30, 17]
    whole = _Requests(lengths, ids_on_device=False, keep=keep).step([0, 0], lengths)
    requests = _Requests(lengths, ids_on_device=False, keep=keep)
    monkeypatch.setattr(vllm_pooler, "block_rows", lambda device, vocab_size: 4)
    assert requests.step([0, 0], [11, 5]) == [None, None]
    assert requests.step([0, 5], [2, 9]) == [None, None]  # the first was preempted
    pieces = requests.step([2, 9], lengths)
    for found, expected in zip(pieces, whole, strict=True):
        assert found is not None
        assert expected is not None
        first, again = unpack(expected.numpy(), keep), unpack(found.numpy(), keep)
        assert np.array_equal(first.counts, again.counts)
        assert np.array_equal(first.ids, again.ids)
    # the test would notice chance that is the same everywhere
    assert len(np.unique(unpack(whole[0].numpy(), keep).counts)) > 1
