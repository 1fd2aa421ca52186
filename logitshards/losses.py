"""The loss for models of the caller's own: as a module, and its arguments from rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from logitshards.row import Row
from shards.rows import Float32Array
from student_train.data.batches import Batch
from student_train.objective.distillation import Objective, Targets
from student_train.objective.kept_entries import KeptEntries, Run
from student_train.objective.loss import IGNORE_INDEX, Loss, distillation_loss


def labels_and_targets(rows: Row | Sequence[Row]) -> tuple[Tensor, Targets]:
    """Labels [T] int64 and targets of the T positions of one row, or of several, one after another.

    A label is -100, to be ignored, where `loss_mask` is false. Position t belongs to the hidden
    state that the student has after `tokens[0 .. t]` of its row: give the student `tokens[:-1]`.

    All rows are of one dataset. ValueError for no rows, ShardError for a dataset of tokens alone.
    """
    rows = [rows] if isinstance(rows, Row) else list(rows)
    if not rows:
        raise ValueError("no rows: nothing to make labels of")
    runs: list[Run] = []
    start = 0
    for row in rows:
        runs.append(Run(start, row.ids.counts, row.ids.flat, row.logprobs.flat))
        start += len(row)
    labels = np.concatenate([_labels(row) for row in rows])
    return torch.from_numpy(labels), Targets(
        KeptEntries.gather(runs, start),
        _joined([row.tail_logmass for row in rows]),
        _joined([row.entropies for row in rows]),
    )


class DistillationLoss(nn.Module):
    """The loss of batches, for a model whose logits are hidden states times the weight of `head`.

    `head` has a `weight` [V, D] and no bias, like the `lm_head` of a Hugging Face model. It stays
    part of the model: this module refers to it, and has no parameters of its own. So it adds
    nothing to a state dict, and a weight that is tied or replaced is the model's own.

    A model under FSDP2 has whole weights only in the forward pass of what `fully_shard` wraps: call
    this module there.
    """

    def __init__(self, head: nn.Module, objective: Objective) -> None:
        """ValueError for a head with a bias, whose logits are other ones."""
        super().__init__()
        if getattr(head, "bias", None) is not None:
            raise ValueError("the head has a bias, which the loss would leave out")
        self._head = (head,)  # in a tuple, so that it is not registered a second time
        self.objective = objective

    def forward(self, hidden: Tensor, batch: Batch) -> Loss:
        """The sums over the labels of a batch, from hidden states [B, L, D] on its device.

        ValueError if the weight is sharded here, the batch lacks the entries, or the hidden states
        are of other positions than the labels.
        """
        weight = self._head[0].weight
        assert isinstance(weight, Tensor)
        if isinstance(weight, DTensor):
            raise ValueError(
                "the weight of the head is sharded here: call the loss inside the forward pass of"
                " the module that fully_shard wraps, and do not wrap the head itself"
            )
        if hidden.shape[:-1] != batch.labels.shape:
            raise ValueError(
                f"hidden states {list(hidden.shape)} do not belong to labels"
                f" {list(batch.labels.shape)}"
            )
        labels, targets = batch.labels.flatten(), batch.targets(self.objective)
        return distillation_loss(hidden.flatten(0, 1), weight, labels, targets, self.objective)


def _labels(row: Row) -> npt.NDArray[np.int64]:
    labels = row.tokens[1:].astype(np.int64)
    if row.loss_mask is not None:
        labels[~row.loss_mask] = IGNORE_INDEX
    return labels


def _joined(columns: Sequence[Float32Array | None]) -> Tensor | None:
    """A column of all rows end to end; None if the dataset does not have it."""
    present = [column for column in columns if column is not None]
    return torch.from_numpy(np.concatenate(present)) if present else None
