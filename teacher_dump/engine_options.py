"""What an engine is asked for: one frozen object, the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from teacher_dump.keep import Keep


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """A teacher, how it is run, and what is kept of its distributions.

    `sequence_length` is in tokens that the teacher reads. `seed` decides, with a position's own
    place, over what is random in `keep`. `engine_args` go to vLLM.
    """

    teacher_folder: Path
    architecture: str
    dtype: str
    head_dtype: str
    sequence_length: int
    keep: Keep
    seed: int = 0
    engine_args: Mapping[str, object] = field(default_factory=dict)
    trust_remote_code: bool = False
