"""The one interface between the pass and whatever runs the teacher.

An engine takes numbered token sequences and gives back, in any order, what was selected at each
labelled position. Everything else (which sequences, what becomes of them) is the pass's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from teacher_dump.engine_options import EngineOptions
from teacher_dump.packing import Selected
from teacher_dump.sequences import TokenSequence


class TeacherEngine(Protocol):
    """Runs a teacher over sequences."""

    def score(self, sequences: Iterable[TokenSequence]) -> Iterator[tuple[TokenSequence, Selected]]:
        """Every sequence once, in any order, T = n - 1 positions each; consumed as it is needed.

        Raises RunError where the engine stops.
        """
        ...


def check_engine(engine: str, options: EngineOptions) -> None:
    """Raise InputError for an architecture or arguments that the engine does not take."""
    if engine == "transformers":
        from teacher_dump import transformers_engine

        transformers_engine.find_model_class(
            options.teacher_folder, trust_remote_code=options.trust_remote_code
        )
    elif engine == "vllm-logprobs":
        from teacher_dump import vllm_logprobs_engine

        vllm_logprobs_engine.check(options)
    else:
        from teacher_dump import vllm_engine

        vllm_engine.check(options)


def start_engine(engine: str, options: EngineOptions) -> TeacherEngine:
    """Load the teacher into the engine of that name; the import of the engine happens here.

    Raises InputError for an engine that does not take the model or the arguments.
    """
    if engine == "transformers":
        from teacher_dump.transformers_engine import TransformersEngine

        return TransformersEngine(options)
    if engine == "vllm-logprobs":
        from teacher_dump.vllm_logprobs_engine import VllmLogprobsEngine

        return VllmLogprobsEngine(options)
    from teacher_dump.vllm_engine import VllmEngine

    return VllmEngine(options)
