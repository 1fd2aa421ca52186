"""One optimizer step, whatever it is part of: a run, a test or a benchmark.

    sum over micro batches of the loss' gradient, divided once by the labelled positions of the
    whole step, clipped, AdamW

Dividing every micro batch by its own number of positions would weigh short ones more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from shards.errors import RunError, first_line
from student_train.config import TrainConfig
from student_train.data.batches import Batch
from student_train.model.model import head_weight, hidden_states
from student_train.objective.distillation import Objective, Targets
from student_train.objective.loss import Loss, distillation_loss


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Means over the labelled positions of one step, nats, and the gradient's norm unclipped.

    num_sequences are those trained on, by the dataset that they are of.
    """

    num_tokens: int
    num_sequences: tuple[int, ...]
    loss: float
    lm: float
    kd: float
    gradient_norm: float


def make_optimizer(model: PreTrainedModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and none on norms and biases; fused on a GPU."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(config.beta1, config.beta2),
        fused=model.device.type == "cuda",
    )


def autocast_for(dtype: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a model runs in `bfloat16` or `float32`; can be entered repeatedly."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, torch.bfloat16)


def optimizer_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[Batch],
    loss_of: Callable[[PreTrainedModel, Batch], Loss],
    *,
    gradient_clip: float,
    autocast: AbstractContextManager[object],
) -> StepResult:
    """Train on the micro batches of one step, which may be on another device than the model.

    `loss_of` gives the summed loss of a batch, `batch_loss` unless a benchmark compares another.
    torch.OutOfMemoryError leaves the weights as they were; RunError if memory ran out after that.
    """
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(3, device=head_weight(model).device)
    num_tokens = 0
    num_sequences: list[tuple[int, ...]] = []
    for batch in micro_batches:
        with autocast:
            loss = loss_of(model, batch.to(sums.device))
        loss.total.backward()  # type: ignore[no-untyped-call]
        sums += torch.stack(loss).detach()
        num_tokens += batch.num_valid
        num_sequences.append(batch.num_sequences)
    scale = 1 / max(1, num_tokens)
    torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], scale)
    norm = clip_grad_norm_(model.parameters(), gradient_clip or math.inf)
    try:
        optimizer.step()
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"AdamW ran out of memory in the middle of a step ({first_line(error)}); the same"
            " command with a smaller --micro-batch-sequences continues from the last checkpoint"
        ) from error
    loss_mean, lm, kd = (sums * scale).tolist()
    return StepResult(
        num_tokens=num_tokens,
        num_sequences=tuple(map(sum, zip(*num_sequences, strict=True))),
        loss=loss_mean,
        lm=lm,
        kd=kd,
        gradient_norm=norm.item(),
    )


def batch_loss(model: PreTrainedModel, batch: Batch, *, objective: Objective) -> Loss:
    """The summed loss of a batch on the model's device."""
    targets = None
    if objective.alpha and batch.entries is not None:
        tail = batch.tail_logmass if objective.bucket else None
        entropies = batch.entropies
        targets = Targets(
            batch.entries,
            None if tail is None else tail.flatten(),
            None if entropies is None else entropies.flatten(),
        )
    hidden = hidden_states(model, batch.input_ids, batch.position_ids).flatten(0, 1)
    return distillation_loss(hidden, head_weight(model), batch.labels.flatten(), targets, objective)
