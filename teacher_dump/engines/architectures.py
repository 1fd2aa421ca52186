"""What a teacher's configuration tells an engine: its architecture, how it scales positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The ends of names of architectures that can be teachers; text alone, if multimodal.
CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def names_no_head(architecture: str) -> bool:
    """Whether it is layers alone by its name, such as `LlamaModel`, to which vLLM adds a head."""
    return architecture.endswith("Model") and not architecture.endswith(
        ("LMHeadModel", "ChatModel")
    )


def rope_parameters(text_config: Any) -> list[Mapping[str, Any]]:
    """How positions are rotated: one mapping, or one for each type of layer beside it."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    return [rope, *(part for part in rope.values() if isinstance(part, Mapping))]


def longrope_lengths(text_config: Any) -> list[int]:
    """Lengths beyond which vLLM takes the long factors of longrope for every sequence."""
    beside = getattr(text_config, "original_max_position_embeddings", None)
    lengths = [
        part.get("original_max_position_embeddings") or beside
        for part in rope_parameters(text_config)
        if part.get("rope_type") == "longrope"
    ]
    return [int(length) for length in lengths if length]
