"""A student sharded over the processes of a run by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Every process holds its part of each weight, of its gradient and of AdamW's moments. A decoder block
is gathered whole while it runs, everything else (embedding, last norm, head) for the whole forward
and backward pass. Outside of the forward pass a weight is a DTensor, and this process holds a part
of it. So a function that needs weights as tensors runs inside the forward pass, by `in_forward`.

Gradients are summed over the processes, not averaged: the step divides them once, by the labelled
positions of all processes together.

On a GPU the forward and backward pass run in bfloat16 on rounded copies of the float32 weights
(`MixedPrecisionPolicy`), one GPU included; gradients are summed in float32. On CPUs autocast does
the same as in one process, which needs no sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from student_train.processes.world import World

_T = TypeVar("_T")


class Sharded(nn.Module):
    """A sharded model; calling it runs a function of the model within the forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns, with all weights outside of decoder blocks as tensors."""
        return function(self.model, *arguments)


def model_of(student: PreTrainedModel | Sharded) -> PreTrainedModel:
    """The model itself, whose weights may be sharded."""
    return student.model if isinstance(student, Sharded) else student


def in_forward(
    student: PreTrainedModel | Sharded, function: Callable[..., _T], *arguments: Any
) -> _T:
    """`function(model, *arguments)`, where it sees whole weights. Collective."""
    if isinstance(student, Sharded):
        result: _T = student(function, *arguments)
        return result
    return function(student, *arguments)


def reshard(student: PreTrainedModel | Sharded) -> None:
    """Let go of the weights that a forward pass without a backward pass leaves gathered."""
    if isinstance(student, FSDPModule):
        student.reshard()


def is_sharded(world: World) -> bool:
    """Whether the student of a run is sharded: not for one process on a CPU."""
    return world.size > 1 or world.device.type == "cuda"


def precision_for(dtype: str, device: torch.device) -> MixedPrecisionPolicy:
    """The dtypes of a sharded model for a `--dtype`. On CPUs autocast sets them instead."""
    if dtype == "float32" or device.type == "cpu":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    world: World,
    precision: MixedPrecisionPolicy,
) -> PreTrainedModel | Sharded:
    """The student that the processes of a run share; one process on a CPU keeps its model.

    Each of its `blocks` is gathered alone, everything else together. The weights are those of the
    first process. Collective.
    """
    if not is_sharded(world):
        return model
    whole = dict(_tensors(model)) if world.is_first else {}
    mesh = init_device_mesh(world.device.type, (world.size,))
    student = Sharded(model)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    # A batch goes through here, with log-probabilities of the teacher that must not be rounded.
    fully_shard(student, mesh=mesh, mp_policy=replace(precision, cast_forward_inputs=False))
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no division
            module.set_gradient_divide_factor(1.0)
            # An expert that gets no token on one process may get some on another.
            module.set_reduce_scatter_unused_params(True, recurse=False)
    _fill(model, whole, world)
    return student


def whole_weights(model: PreTrainedModel, world: World) -> dict[str, Tensor]:
    """All weights and buffers of a sharded model on the first process' CPU; else {}. Collective.

    One weight after the other is gathered, so that no GPU holds more than one. Tied weights are
    one tensor, as in the model.
    """
    names: dict[str, Tensor] = {}
    gathered: dict[Tensor, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor not in gathered:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            gathered[tensor] = whole.detach().cpu() if world.is_first else torch.empty(0)
        names[name] = gathered[tensor]
    return names if world.is_first else {}


@torch.no_grad()
def _fill(model: PreTrainedModel, whole: Mapping[str, Tensor], world: World) -> None:
    """Give every process its part of the first process' tensors, one after the other."""
    for name, tensor in _tensors(model):
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device=world.device)
        if world.is_first:
            buffer.copy_(whole[name])
        dist.broadcast(buffer, src=0)
        if isinstance(tensor, DTensor):
            mesh, placements = tensor.device_mesh, tensor.placements
            buffer = distribute_tensor(buffer, mesh, placements, src_data_rank=None)
        tensor.copy_(buffer)


def _tensors(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """All weights and buffers, tied ones once, detached from what they may become."""
    return [
        (name, tensor.detach())
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]
