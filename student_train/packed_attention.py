"""Attention that stops at the joints of packed sequences, so that each is read as if it were alone.

A model of transformers is told by its position ids, which begin again with every sequence. It then
attends within a sequence: through a mask of [L, L] on a CPU, by blocks without one on a GPU (flex
attention). Not every model does: one that keeps a state or convolves over tokens goes on over the
joints. So a model must show it before anything is trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shards.errors import InputError
from student_train.blocks import first_line
from student_train.model import hidden_states

_PROBE_LENGTHS = [7, 4, 5]
# Of what the model would be off without any joints. Whoever sees over them is off by about 1.
_TOLERANCE = 0.05


def block_at_joints(student: str, model: PreTrainedModel, dataset: Path) -> None:
    """Choose the model's attention for packed sequences. InputError if it sees over their joints.

    The model is on the device where it is trained; `dataset` is what needs it.
    """
    name = type(model).__name__
    refused = (
        f"--student {student}: {name} cannot be trained on packed sequences, which the separate"
        f" documents of {dataset} need"
    )
    try:
        if model.device.type == "cuda":
            model.set_attn_implementation("flex_attention")
        error = _error_of_packing(model)
    except (ValueError, TypeError, RuntimeError, ImportError) as cause:  # of torch.compile too
        raise InputError(f"{refused}: {first_line(cause)}") from cause
    if not error < _TOLERANCE:
        raise InputError(f"{refused}: one changes what it computes for the next")


def _error_of_packing(model: PreTrainedModel) -> float:
    """How far packed hidden states are from those of each sequence alone; 1: as if joined."""
    total = sum(_PROBE_LENGTHS)
    vocab_size = len(model.get_input_embeddings().weight)
    tokens = torch.arange(3, 3 + total, device=model.device)[None] % vocab_size
    restarting = torch.cat([torch.arange(length) for length in _PROBE_LENGTHS])[None]
    running = torch.arange(total)[None]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        alone = torch.cat(
            [hidden_states(model, part) for part in torch.split(tokens, _PROBE_LENGTHS, 1)], 1
        )

        def off(position_ids: Tensor) -> float:
            states = hidden_states(model, tokens, position_ids.to(model.device))
            return (states - alone).abs().max().item()

        packed, joined = off(restarting), off(running)
    model.train(was_training)
    return packed / max(joined, 1e-30)
