"""How a student's decoder blocks run: compiled, or with their activations computed twice.

Both stay outside the loss, which has its gradients from its own forward pass and would compile to
nothing faster. A checkpointed block is compiled inside its checkpoint.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from shards.errors import InputError, first_line
from student_train.config import TrainConfig
from student_train.model.model import hidden_states
from student_train.processes.sharding import Sharded, in_forward


def prepare_blocks(config: TrainConfig, model: PreTrainedModel) -> None:
    """Apply `--gradient-checkpointing` and `--compile` to the blocks, before they are sharded.

    InputError for a model that cannot.
    """
    name = _name(config, model)
    if config.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise InputError(
                f"{name} does not support --gradient-checkpointing: {error}"
            ) from error
    if not config.compile:
        return
    blocks = decoder_blocks(model)
    if not blocks:
        raise InputError(f"{name} does not name its blocks, which --compile needs")
    for block in blocks:
        block.compile()


def try_compiled(
    config: TrainConfig,
    student: PreTrainedModel | Sharded,
    *,
    sequence_length: int,
    packed: bool,
    device: torch.device,
    autocast: AbstractContextManager[object],
) -> None:
    """Run compiled blocks on a micro batch of full length, as it is trained on. Collective.

    InputError for a model or a machine that cannot.
    """
    if not config.compile:
        return
    shape = (config.micro_batch_sequences, sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    # Two sequences a line: a model that meets a joint makes another mask.
    positions = torch.arange(sequence_length, device=device) % -(-sequence_length // 2)
    places = positions.expand(shape) if packed else None
    try:
        with autocast:
            states = in_forward(student, hidden_states, tokens, places)
        states.float().sum().backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # those of torch.compile are among them
        model = student.model if isinstance(student, Sharded) else student
        raise InputError(
            f"{_name(config, model)} does not run with --compile: {first_line(error)}"
        ) from error
    student.zero_grad(set_to_none=True)


def _name(config: TrainConfig, model: PreTrainedModel) -> str:
    return f"--student {config.student}: {type(model).__name__}"


def decoder_blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The outermost modules that transformers never splits over devices: decoder blocks."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks: list[torch.nn.Module] = []
    waiting: list[torch.nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        if type(module).__name__ in names:
            blocks.append(module)
        else:
            waiting.extend(module.children())
    return blocks
