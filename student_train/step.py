"""One optimizer step, whatever it is part of: a run, a test or a benchmark.

    sum over micro batches of the loss' gradient, divided once by the labelled positions of the
    whole step, clipped, AdamW

Dividing every micro batch by its own number of positions would weigh short ones more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from shards.errors import RunError, first_line
from student_train.config import TrainConfig
from student_train.data.batches import Batch
from student_train.data.order import Position
from student_train.model.model import head_weight, hidden_states
from student_train.objective.distillation import Objective
from student_train.objective.loss import Loss, distillation_loss
from student_train.processes.sharding import Sharded, in_forward
from student_train.processes.world import World

Seen = Callable[[Tensor, Tensor, Batch], None]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Means over the labelled positions of one step, nats, and the gradient's norm unclipped.

    num_sequences are those trained on, by dataset. All figures are those of all processes together.
    positions say where each dataset is after the step; None: the batches were no whole step.
    """

    num_tokens: int
    num_sequences: tuple[int, ...]
    positions: tuple[Position, ...] | None
    loss: float
    lm: float
    kd: float
    gradient_norm: float


def make_optimizer(model: PreTrainedModel | Sharded, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and none on norms and biases; fused on a GPU."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(config.beta1, config.beta2),
        fused=matrices[0].device.type == "cuda",
    )


def autocast_for(
    dtype: str, device: torch.device, *, sharded: bool = False
) -> AbstractContextManager[object]:
    """The context in which a model runs in `bfloat16` or `float32`; can be entered repeatedly.

    A model that is `sharded` on GPUs has weights of that dtype in its forward pass, and needs none.
    """
    if dtype == "float32" or (sharded and device.type == "cuda"):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def optimizer_step(
    student: PreTrainedModel | Sharded,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[Batch],
    loss_of: Callable[[PreTrainedModel, Batch], Loss],
    *,
    gradient_clip: float,
    autocast: AbstractContextManager[object],
    world: World | None = None,
) -> StepResult:
    """Train on the micro batches of one step, which may be on another device than the model.

    `loss_of` gives the summed loss of a batch, `batch_loss` unless a benchmark compares another.
    Every process of `world` gives as many micro batches, and all of them get the same result.

    torch.OutOfMemoryError leaves the weights as they were, and so does what the micro batches
    raise, on any process; RunError if memory ran out after that.
    """
    parameters = list(student.parameters())
    world = World(device=parameters[0].device) if world is None else world
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(3, device=world.device)
    counts: list[list[int]] = []
    positions = None
    for batch in _agreed(micro_batches, world):
        with autocast:
            loss = in_forward(student, loss_of, batch.to(world.device))
        loss.total.backward()  # type: ignore[no-untyped-call]
        sums += torch.stack(loss).detach()
        counts.append([batch.num_valid, *batch.num_sequences])
        positions = batch.positions
    num_tokens, *num_sequences = world.sum_counts(
        [sum(column) for column in zip(*counts, strict=True)]
    )
    scale = 1 / max(1, num_tokens)
    torch._foreach_mul_([_local(p.grad) for p in parameters if p.grad is not None], scale)
    norm = clip_grad_norm_(parameters, gradient_clip or math.inf)
    try:
        optimizer.step()
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"AdamW ran out of memory in the middle of a step ({first_line(error)}); the same"
            " command with a smaller --micro-batch-sequences continues from the last checkpoint"
        ) from error
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    loss_mean, lm, kd = (world.add(sums) * scale).tolist()
    return StepResult(
        num_tokens=num_tokens,
        num_sequences=tuple(num_sequences),
        positions=positions,
        loss=loss_mean,
        lm=lm,
        kd=kd,
        gradient_norm=norm.item(),
    )


def _agreed(batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """The batches, as long as no process fails to read one."""
    iterator = iter(batches)
    while True:
        batch = world.together(lambda: next(iterator, None))
        if batch is None:
            return
        yield batch


def _local(gradient: Tensor) -> Tensor:
    """What this process holds of a gradient."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def batch_loss(
    model: PreTrainedModel, batch: Batch, *, objective: Objective, seen: Seen | None = None
) -> Loss:
    """The summed loss of a batch on the model's device.

    `seen` is called before it with the hidden states [B L, D], the head's weight [V, D] and the
    batch, without gradients.
    """
    hidden = hidden_states(model, batch.input_ids, batch.position_ids).flatten(0, 1)
    weight = head_weight(model)
    if seen is not None:
        seen(hidden.detach(), weight.detach(), batch)
    return distillation_loss(
        hidden,
        weight,
        batch.labels.flatten(),
        batch.targets(objective),
        objective,
        num_labels=batch.num_valid,
    )
