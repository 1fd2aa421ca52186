"""The stream keeps an engine fed by tokens, however short the sequences, and no further ahead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from teacher_dump.engines.vllm_errors import ErrorLog
from teacher_dump.engines.vllm_start import Started
from teacher_dump.engines.vllm_stream import VllmStream
from teacher_dump.keep.rows import TokenSequence

BATCH = 100


class _Engine:
    """Finishes the oldest sequences of a batch at every step; notes what it had been given."""

    def __init__(self) -> None:
        config = SimpleNamespace(max_num_batched_tokens=BATCH)
        self.vllm_config = SimpleNamespace(scheduler_config=config)
        self.waiting: list[tuple[str, int]] = []
        self.given: list[int] = []

    def step(self) -> list[Any]:
        self.given.append(sum(tokens for _, tokens in self.waiting))
        room, done = BATCH, []
        while self.waiting and (not done or self.waiting[0][1] <= room):
            request, tokens = self.waiting.pop(0)
            room -= tokens
            done.append(SimpleNamespace(request_id=request, finished=True))
        return done


@pytest.mark.parametrize("length", [3, 40, 1000])
def test_the_engine_has_four_batches_before_it_and_little_more(length: int) -> None:
    engine = _Engine()
    sequences = [
        TokenSequence(
            split="train", number=n, tokens=np.zeros(length, np.int32), segments=np.empty(0)
        )
        for n in range(500)
    ]

    def submit(request: str, sequence: TokenSequence) -> None:
        engine.waiting.append((request, len(sequence.tokens)))

    stream = VllmStream(Started(SimpleNamespace(llm_engine=engine), ErrorLog()))
    found = [sequence.number for sequence, _ in stream.run(sequences, submit)]
    assert found == list(range(500))
    full = [given for given in engine.given[:-8] if given < 500 * length]
    before_the_end = full[: len(full) // 2]
    assert min(before_the_end) >= 4 * BATCH
    assert max(engine.given) <= max(4 * BATCH + length, 8 * length)
