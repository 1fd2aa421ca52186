"""The one interface between the pass and whatever runs the teacher.

An engine takes numbered token sequences and gives back, in any order, what was selected at each
labelled position. Everything else (which sequences, what becomes of them) is the pass's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from teacher_dump.keep import Keep
from teacher_dump.packing import Selected
from teacher_dump.sequences import TokenSequence


class TeacherEngine(Protocol):
    """Runs a teacher over sequences."""

    def score(self, sequences: Iterable[TokenSequence]) -> Iterator[tuple[TokenSequence, Selected]]:
        """Every sequence once, in any order, T = n - 1 positions each; consumed as it is needed.

        Raises RunError where the engine stops.
        """
        ...


def check_engine(
    engine: str,
    *,
    teacher_folder: Path,
    architecture: str,
    sequence_length: int,
    keep: Keep,
    engine_args: Mapping[str, object],
    trust_remote_code: bool,
) -> None:
    """Raise InputError for an architecture or arguments that the engine does not take."""
    if engine == "transformers":
        from teacher_dump import transformers_engine

        transformers_engine.find_model_class(teacher_folder, trust_remote_code=trust_remote_code)
        return
    if engine == "vllm-logprobs":
        from teacher_dump import vllm_logprobs_engine

        vllm_logprobs_engine.check(
            teacher_folder,
            architecture=architecture,
            sequence_length=sequence_length,
            engine_args=engine_args,
            trust_remote_code=trust_remote_code,
        )
        return
    from teacher_dump import vllm_engine

    vllm_engine.check(
        teacher_folder,
        architecture=architecture,
        sequence_length=sequence_length,
        keep=keep,
        engine_args=engine_args,
        trust_remote_code=trust_remote_code,
    )


def start_engine(
    engine: str,
    *,
    teacher_folder: Path,
    architecture: str,
    dtype: str,
    head_dtype: str,
    sequence_length: int,
    keep: Keep,
    seed: int,
    engine_args: Mapping[str, object],
    trust_remote_code: bool,
) -> TeacherEngine:
    """Load the teacher into the engine of that name; the import of the engine happens here.

    `seed` decides, with a position's own place, over what is random in `keep`.
    Raises InputError for an engine that does not take the model or the arguments.
    """
    common: dict[str, Any] = {
        "teacher_folder": teacher_folder,
        "dtype": dtype,
        "head_dtype": head_dtype,
        "keep": keep,
        "trust_remote_code": trust_remote_code,
    }
    if engine == "transformers":
        from teacher_dump.transformers_engine import TransformersEngine

        return TransformersEngine(seed=seed, **common)
    common |= {
        "architecture": architecture,
        "sequence_length": sequence_length,
        "engine_args": engine_args,
    }
    if engine == "vllm":
        from teacher_dump.vllm_engine import VllmEngine

        return VllmEngine(seed=seed, **common)
    from teacher_dump.vllm_logprobs_engine import VllmLogprobsEngine

    return VllmLogprobsEngine(**common)
