"""How a student's decoder blocks run: compiled, or with their activations computed twice.

Both stay outside the loss, which has its gradients from its own forward pass and would compile to
nothing faster. A checkpointed block is compiled inside its checkpoint.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from shards.errors import InputError
from student_train.config import TrainConfig
from student_train.model import hidden_states


def prepare_blocks(
    config: TrainConfig,
    model: PreTrainedModel,
    *,
    sequence_length: int,
    autocast: AbstractContextManager[object],
) -> None:
    """Do to the blocks what `--gradient-checkpointing` and `--compile` say.

    Compiled ones are tried on a micro batch of full length, forwards and backwards. InputError for
    a model or a machine that cannot.
    """
    name = f"--student {config.student}: {type(model).__name__}"
    if config.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise InputError(f"{name} has no --gradient-checkpointing: {error}") from error
    if not config.compile:
        return
    blocks = decoder_blocks(model)
    if not blocks:
        raise InputError(f"{name} does not say what its blocks are, which --compile needs")
    for block in blocks:
        block.compile()
    shape = (config.micro_batch_sequences, sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=model.device)
    try:
        with autocast:
            states = hidden_states(model, tokens)
        states.float().sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:  # those of torch.compile are among them
        first_line = str(error).strip().partition("\n")[0]
        raise InputError(f"{name} cannot be compiled here: {first_line}") from error
    model.zero_grad(set_to_none=True)


def decoder_blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that transformers never splits over devices: its decoder blocks, in order."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
