"""Attention that stops at the joints of packed sequences, as if each were alone.

Position ids that begin again with every sequence tell a model of transformers where a joint is. It
then attends within a sequence: with a mask of [L, L] on a CPU, by blocks without a mask on a GPU
(flex attention). A model that keeps a state or convolves over tokens does not stop at the joints.
So a probe runs before training, twice: exactly on a few tokens, which shows even a small leak; then
as in training, in its dtype, forwards and backwards, with the attention and the length of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shards.errors import InputError, first_line
from student_train.model.model import hidden_states

_ATTENTION = {"cuda": "flex_attention"}  # of other devices the model's own, with a mask
_PROBE_TOKENS = 16
_PROBE_STRIDE = 7919  # spreads tokens over the vocabulary, whose first ones are special
# As a fraction of the error without any joints. A model that sees over them has about 1.
_TOLERANCE = 0.05


def block_at_joints(
    student: str,
    model: PreTrainedModel,
    dataset: Path,
    *,
    length: int,
    autocast: AbstractContextManager[object],
    option: str = "--student",
) -> None:
    """Choose the model's attention for packed sequences. InputError if it sees over their joints.

    The model is on the device where it is trained, `length` the positions of a line and `autocast`
    what surrounds it there; `dataset` is what needs it.
    """
    name = type(model).__name__
    refused = (
        f"{option} {student}: {name} cannot run on packed sequences, which the separate"
        f" documents of {dataset} need"
    )
    limit = _longest_alike(model.config.get_text_config())
    if length > limit:
        raise InputError(
            f"{refused}: beyond {limit} positions the longest document of a batch changes how the"
            " positions of all are rotated"
        )
    attention = _ATTENTION.get(model.device.type)
    # A mask is the same thing at any length, and slow at a large one.
    length = _PROBE_TOKENS if attention is None else max(length, _PROBE_TOKENS)
    was_training = model.training
    try:
        blocks = _error_of_packing(model, _PROBE_TOKENS, nullcontext(), math.inf) < _TOLERANCE
        if blocks:
            blocks = _error_of_packing(model, length, autocast, 2, attention) < _TOLERANCE
            _go_backwards(model, length, autocast)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, ImportError) as cause:  # of torch.compile too
        raise InputError(f"{refused}: {first_line(cause)}") from cause
    finally:
        model.train(was_training)
    if not blocks:
        raise InputError(f"{refused}: one document changes what it computes for the next")


def _longest_alike(config: Any) -> float:
    """Up to how many positions a model of transformers rotates them alike in every batch.

    "longrope" has other frequencies if the largest position of a batch is beyond the original ones.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]
    own = getattr(config, "original_max_position_embeddings", None)
    lengths = [
        part.get("original_max_position_embeddings") or own or config.max_position_embeddings
        for part in parts
        if part.get("rope_type") == "longrope"
    ]
    return min(lengths, default=math.inf)


def _error_of_packing(
    model: PreTrainedModel,
    length: int,
    autocast: AbstractContextManager[object],
    order: float,
    attention: str | None = None,
) -> float:
    """How far packed hidden states are from those of each sequence alone; 1: as if joined.

    In the norm of this order, beyond twice what rounding does to each alone. `attention` is that of
    the packed ones, and stays the model's.
    """
    tokens, restarting, parts = _probe(model, length)
    running = torch.arange(length, device=model.device)[None]

    def alone() -> Tensor:
        return torch.cat([hidden_states(model, part) for part in torch.split(tokens, parts, 1)], 1)

    model.eval()
    with torch.no_grad():
        exact = alone()
        with autocast:
            rounded, joined = alone(), hidden_states(model, tokens, running)
            if attention is not None:
                model.set_attn_implementation(attention)
            packed = hidden_states(model, tokens, restarting)
    noise, joined_error, off = (
        torch.linalg.vector_norm((states - exact).double(), order).item()
        for states in (rounded, joined, packed)
    )
    return float(max(0.0, off - 2 * noise) / max(joined_error, 1e-30))


def _go_backwards(
    model: PreTrainedModel, length: int, autocast: AbstractContextManager[object]
) -> None:
    """Once through the packed line as in a step. RuntimeError for gradients that are not finite."""
    tokens, restarting, _ = _probe(model, length)
    model.train()
    with autocast:
        states = hidden_states(model, tokens, restarting)
    states.float().square().mean().backward()  # type: ignore[no-untyped-call]
    finite = all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    if not finite:
        raise RuntimeError("its gradients are not finite")


def _probe(model: PreTrainedModel, length: int) -> tuple[Tensor, Tensor, list[int]]:
    """A line of three sequences: tokens [1, L], positions [1, L], and their lengths."""
    parts = [length * 7 // 16, length * 4 // 16]
    parts.append(length - sum(parts))
    vocab_size = len(model.get_input_embeddings().weight)
    tokens = torch.arange(length, device=model.device)[None] * _PROBE_STRIDE % vocab_size
    restarting = torch.cat([torch.arange(part) for part in parts])[None]
    return tokens, restarting.to(model.device), parts
