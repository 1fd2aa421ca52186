"""One continuous stream of requests through a started vLLM engine, results taken as they finish.

The engine is kept fed with a bounded number of tokens and stepped by hand, so that it never waits
for a shard border, short sequences fill its batches too, and memory does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from shards.errors import RunError
from teacher_dump.engines.vllm_start import Started
from teacher_dump.keep.rows import TokenSequence

_LEAST_SEQUENCES = 8


class VllmStream:
    """The `LLMEngine` of an `LLM`, and how many tokens it is given ahead."""

    def __init__(self, started: Started) -> None:
        self.engine = started.llm.llm_engine
        self._errors = started.errors
        batch = int(self.engine.vllm_config.scheduler_config.max_num_batched_tokens)
        # four full batches ahead: the scheduler never runs dry between two steps of ours
        self._tokens_ahead = 4 * batch

    def run(
        self, sequences: Iterable[TokenSequence], submit: Callable[[str, TokenSequence], None]
    ) -> Iterator[tuple[TokenSequence, Any]]:
        """Every sequence with its finished output, in any order.

        `submit` adds the request of this id for a sequence. RunError where the engine stops.
        """
        source = iter(sequences)
        in_flight: dict[str, TokenSequence] = {}
        tokens = 0
        while True:
            while tokens < self._tokens_ahead or len(in_flight) < _LEAST_SEQUENCES:
                sequence = next(source, None)
                if sequence is None:
                    break
                request = f"{sequence.split}-{sequence.number}"
                submit(request, sequence)
                in_flight[request] = sequence
                tokens += len(sequence.tokens)
            if not in_flight:
                return
            for output in self._step():
                sequence = in_flight.pop(output.request_id)
                tokens -= len(sequence.tokens)
                yield sequence, output

    def _step(self) -> list[Any]:
        try:
            return [output for output in self.engine.step() if output.finished]
        except Exception as error:
            cause = self._errors.cause_of(error)
            raise RunError(f"the engine stopped: {type(error).__name__}: {cause}") from error
