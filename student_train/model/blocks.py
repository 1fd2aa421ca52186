"""How a student's decoder blocks run: compiled, or with their activations computed twice.

Both stay outside the loss, which has its gradients from its own forward pass and would compile to
nothing faster. A checkpointed block is compiled inside its checkpoint.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from shards.errors import InputError, first_line
from student_train.config import TrainConfig
from student_train.model.model import hidden_states

logger = logging.getLogger(__name__)


def prepare_blocks(
    config: TrainConfig,
    model: PreTrainedModel,
    *,
    sequence_length: int,
    packed: bool,
    autocast: AbstractContextManager[object],
    probe: PreTrainedModel | None = None,
) -> None:
    """Apply `--gradient-checkpointing` and `--compile` to the blocks, before they are sharded.

    Compiled ones are tried on a micro batch of full length, as it is trained on: those of `probe`,
    a copy of the model on its device, or the model's own. InputError for a model or a machine that
    cannot; blocks that nobody asked to compile stay as they are.
    """
    probe = model if probe is None else probe
    name = f"--student {config.student}: {type(model).__name__}"
    if config.gradient_checkpointing:
        try:
            for changed in {model, probe}:
                changed.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise InputError(
                f"{name} does not support --gradient-checkpointing: {error}"
            ) from error
    if not (compiles_by_default(probe.device) if config.compile is None else config.compile):
        return
    try:
        _compile(config, probe, sequence_length, packed, autocast)
    except torch.OutOfMemoryError:
        raise
    except (InputError, RuntimeError) as error:  # those of torch.compile are among them
        if config.compile:
            raise InputError(f"{name} does not run with --compile: {first_line(error)}") from error
        logger.warning("warning: %s runs without --compile: %s", name, first_line(error))
        for block in decoder_blocks(probe):
            block._compiled_call_impl = None
        return
    finally:
        probe.zero_grad(set_to_none=True)
    if probe is not model:
        for block in decoder_blocks(model):
            block.compile()


def _compile(
    config: TrainConfig,
    model: PreTrainedModel,
    sequence_length: int,
    packed: bool,
    autocast: AbstractContextManager[object],
) -> None:
    """Compile the blocks, and run them once forwards and backwards."""
    blocks = decoder_blocks(model)
    if not blocks:
        raise InputError("it does not name its blocks")
    for block in blocks:
        block.compile()
    shape = (config.micro_batch_sequences, sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=model.device)
    # Two sequences a line: a model that meets a joint makes another mask.
    positions = torch.arange(sequence_length, device=model.device) % -(-sequence_length // 2)
    with autocast:
        states = hidden_states(model, tokens, positions.expand(shape) if packed else None)
    states.float().sum().backward()  # type: ignore[no-untyped-call]


def compiles_by_default(device: torch.device) -> bool:
    """Whether blocks are compiled if nobody says anything: on a GPU."""
    return device.type == "cuda"


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
