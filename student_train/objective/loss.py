"""Language-model and distillation loss from hidden states, without the logits of the whole batch.

Letters: T tokens, D hidden, V vocabulary, K kept entries, R rows of a block.

For every labelled token, z the student's logits:

    loss = (1 - alpha) * LM + alpha * KD
    LM  = logsumexp(z) - z[label]                         KD: see `distillation`

    d loss / d z = c * softmax(z) - (1 - alpha) * onehot(label) - alpha * w       of KLD and NLL
    c = (1 - alpha) + alpha * sum(w)

w is the target from the teacher's kept entries. H(w) does not depend on the student, so NLL and KLD
have the same gradient.

The gradient of the logits is one scatter away from their softmax. So the forward pass takes a block
of R rows, turns its logits into their gradient in place, and adds up both gradients that backward
needs; only [R, V] exists at any time, and the logits are computed once, not twice. The matrix
products run in the compute dtype; softmax, sums and the weight's gradient are float32 (float64 for
float64 input). Ignored rows are left out before anything is computed. A student temperature other
than 1 needs a second softmax, so a second [R, V].
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from student_train.objective.distillation import (
    Entries,
    Objective,
    Targets,
    distil,
    distil_tempered,
)
from student_train.objective.products import add_product, product, softmax_in_place

IGNORE_INDEX = -100

# Bytes of a block's logits. Every block adds a [V, D] product to the weight's gradient, so those of
# few rows are slow. On 2 cores of an Intel Xeon at T = 2,048, blocks of 128, 192, 256, 512 and 683
# rows take 1.53, 1.40, 1.41, 1.35 and 1.33 s forward and backward in float32 with V = 49,152 and
# D = 576, 4.70, 4.34, 4.39, 4.16 and 4.13 s with V = 151,936, and all the same with D = 128.
_CPU_BLOCK_BYTES = 48 << 20
_CPU_LEAST_ROWS = 192
# By arithmetic, not measured: at 600 TFLOP/s and 3 TB/s adding that product takes 480 / R of the
# time of a block's three products, so that R should be thousands.
GPU_BLOCK_BYTES = 1 << 30


class Loss(NamedTuple):
    """Sums over the labelled tokens: `total` has a gradient; `lm`, `kd` are its parts, unweighted.

    Divide by the number of labelled tokens of the whole optimizer step, not of a micro batch.
    """

    total: Tensor
    lm: Tensor
    kd: Tensor


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    targets: Targets | None,
    objective: Objective,
    *,
    num_labels: int | None = None,
    block_bytes: int | None = None,
) -> Loss:
    """Loss of hidden [T, D] under the head weight [V, D] for labels [T] int64, -100 ignored; nats.

    `targets` is None if and only if alpha is 0. Under autocast the matrix products run in its
    dtype. The result can be differentiated once. `num_labels` is the number of labels that are not
    ignored; without it a GPU waits until it has counted them.

    ValueError if hidden, labels and targets do not have the same number of positions.
    """
    if (targets is None) != (objective.alpha == 0):
        raise ValueError("targets are given if and only if alpha is above 0")
    positions = {"hidden": len(hidden), "labels": len(labels)}
    if targets is not None:
        positions["targets"] = len(targets.entries.offsets) - 1
    if len(set(positions.values())) > 1:
        found = ", ".join(f"{name} {number}" for name, number in positions.items())
        raise ValueError(f"numbers of positions differ: {found}")
    sums = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, targets, objective, num_labels, block_bytes
    )
    return Loss(*sums)


class _FusedLoss(torch.autograd.Function):
    """Forward computes the gradients too; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        targets: Targets | None,
        objective: Objective,
        num_labels: int | None,
        block_bytes: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            blocks = _Blocks(hidden, weight.to(dtype), objective)
            rows = labelled_rows(labels, num_labels)
            row_bytes = weight.shape[0] * blocks.sum_dtype.itemsize
            if block_bytes is None:
                block_bytes = _block_bytes(device, row_bytes)
            parts = split_evenly(rows, block_bytes // row_bytes)
            for block, kept in zip(parts, _kept(parts, targets), strict=True):
                blocks.add(block, labels, kept)
        ctx.gradients = blocks.hidden_gradient, blocks.weight_gradient.to(weight.dtype)
        lm, kd = blocks.lm, blocks.kd
        ctx.mark_non_differentiable(lm, kd)
        return (1 - objective.alpha) * lm + objective.alpha * kd, lm, kd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place: a copy of the weight's gradient would cost a pass over fresh memory.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the loss was differentiated twice; its gradients are used up")
        hidden, weight = gradients
        return hidden.mul_(scale), weight.mul_(scale), None, None, None, None, None


def labelled_rows(labels: Tensor, number: int | None) -> Tensor:
    """Indices [N] of the labels [T] that are not ignored; `number` is N, None if not known."""
    labelled = labels != IGNORE_INDEX
    if number is None:
        return labelled.nonzero().squeeze(1)
    return torch.nonzero_static(labelled, size=number).squeeze(1)


def split_evenly(rows: Tensor, limit: int) -> tuple[Tensor, ...]:
    """Indices of rows [N] in the fewest parts of about equal size with at most `limit` rows."""
    return rows.tensor_split(-(-len(rows) // max(1, limit))) if len(rows) else ()


class _Kept(NamedTuple):
    """The targets of a block: ids and logprobs [R, K], the others [R, 1] if they are needed."""

    ids: Tensor
    logprobs: Tensor
    tail_logmass: Tensor | None
    entropies: Tensor | None


def _kept(blocks: tuple[Tensor, ...], targets: Targets | None) -> Iterator[_Kept | None]:
    """Those of every block of rows; None for each without targets."""
    if targets is None:
        yield from repeat(None, len(blocks))
        return
    padded = targets.entries.padded_blocks(blocks)
    for rows, (ids, logprobs) in zip(blocks, padded, strict=True):
        # Looking up logits by int32 takes longer than by int64, more than the copy does.
        yield _Kept(
            ids.long(),
            logprobs,
            _rows_of(targets.tail_logmass, rows),
            _rows_of(targets.entropies, rows),
        )


def _rows_of(values: Tensor | None, rows: Tensor) -> Tensor | None:
    """values [T] at rows [R] -> [R, 1]."""
    return None if values is None else values.index_select(0, rows).unsqueeze(1)


def _block_bytes(device: str, row_bytes: int) -> int:
    if device != "cpu":
        return GPU_BLOCK_BYTES
    return max(_CPU_BLOCK_BYTES, _CPU_LEAST_ROWS * row_bytes)


class _Blocks:
    """Sums and gradients as they grow, block by block."""

    def __init__(self, hidden: Tensor, weight: Tensor, objective: Objective) -> None:
        """`weight` [V, D] is in the compute dtype."""
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.sum_dtype = wide
        self.hidden_gradient = torch.zeros_like(hidden)
        self.weight_gradient = torch.zeros_like(weight, dtype=wide)
        self.lm = torch.zeros((), dtype=wide, device=hidden.device)
        self.kd = torch.zeros((), dtype=wide, device=hidden.device)
        self._hidden = hidden
        self._weight = weight
        self._objective = objective
        # Reused by all blocks: fresh memory costs as much as the softmax itself.
        self._wide = self._narrow = torch.empty(0, dtype=wide, device=hidden.device)
        self._tempered = self._wide

    def add(self, rows: Tensor, labels: Tensor, kept: _Kept | None) -> None:
        """Account for the rows [R] of the batch, all of them labelled."""
        alpha = self._objective.alpha
        hidden = self._hidden.index_select(0, rows).to(self._weight.dtype)
        logits = self._logits(hidden)
        label = labels.index_select(0, rows).unsqueeze(1)
        label_logits = logits.gather(1, label)
        if kept is not None:
            kept_logits = logits.gather(1, kept.ids)
            tempered = self._tempered_softmax(logits)
        probabilities, logsumexp = softmax_in_place(logits)
        self.lm += (logsumexp - label_logits).sum()
        coefficient = torch.ones_like(label_logits)
        if kept is not None:
            tail, entropies = kept.tail_logmass, kept.entropies
            entries = Entries(
                ids=kept.ids,
                logprobs=kept.logprobs.to(self.sum_dtype),
                logits=kept_logits,
                logsumexp=logsumexp,
                tail_logmass=None if tail is None else tail.to(self.sum_dtype),
                entropies=None if entropies is None else entropies.to(self.sum_dtype),
            )
            if tempered is None:
                kd, coefficient = distil(probabilities, entries, self._objective)
            else:
                kd, coefficient = distil_tempered(
                    probabilities, *tempered, entries, self._objective
                )
            self.kd += kd
        off_label = (alpha - 1) / torch.where(coefficient > 0, coefficient, 1.0)
        probabilities.scatter_add_(1, label, off_label)
        self._add_gradients(rows, hidden, probabilities, coefficient)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[R, V], products in the compute dtype, then wide."""
        if self._wide.shape[0] < len(hidden):
            shape = (len(hidden), len(self._weight))
            self._wide = self._wide.new_empty(shape)
            same = self._weight.dtype == self.sum_dtype
            self._narrow = self._wide if same else self._weight.new_empty(shape)
        narrow, wide = self._narrow[: len(hidden)], self._wide[: len(hidden)]
        return product(hidden, self._weight.T, narrow, wide)

    def _tempered_softmax(self, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """Softmax [R, V] and logsumexp [R, 1] at the student's temperature, None if that is 1."""
        if self._objective.student_temperature == 1:
            return None
        if len(self._tempered) < len(logits):
            self._tempered = torch.empty_like(logits)
        tempered = self._tempered[: len(logits)]
        return softmax_in_place(
            torch.div(logits, self._objective.student_temperature, out=tempered)
        )

    def _add_gradients(
        self, rows: Tensor, hidden: Tensor, of_logits: Tensor, coefficient: Tensor
    ) -> None:
        """Take the gradient of a block's logits to hidden states and weight.

        That gradient is of_logits [R, V] times coefficient [R, 1].
        """
        scaled = (hidden * coefficient).to(hidden.dtype)
        if of_logits.dtype != self._weight.dtype:
            of_logits = self._narrow[: len(hidden)].copy_(of_logits)
        add_product(self.weight_gradient, of_logits.T, scaled)
        gradient = (of_logits @ self._weight) * coefficient
        self.hidden_gradient.index_copy_(0, rows, gradient.to(self.hidden_gradient.dtype))
