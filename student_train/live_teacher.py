"""A teacher that runs beside the student: the exact distribution over the vocabulary as target.

It shows what stored targets cost in quality. Every micro batch has all V log-probabilities of each
position, 8 V bytes, so it is for small models. It runs in float32, whatever the student's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shards.dataset import Dataset
from student_train.data.batches import Batch
from student_train.data.lines import packed_length
from student_train.model.model import check_causal, check_sizes, load_model
from student_train.model.packed_attention import block_at_joints
from student_train.model.student_tokenizer import check_tokenizer
from student_train.objective.distillation import Objective
from student_train.objective.kept_entries import KeptEntries
from student_train.objective.loss import Loss
from student_train.step import Seen, batch_loss


class LiveTeacher:
    """The model of a folder, on the student's device."""

    def __init__(self, folder: Path, datasets: Sequence[Dataset], device: torch.device) -> None:
        """InputError or IdentityMismatchError for a model that is no teacher of these datasets."""
        check_tokenizer(folder, datasets[0], option="--teacher")
        self._model = load_model(folder, option="--teacher").to(device).eval()
        for dataset in datasets:
            check_sizes(str(folder), self._model, dataset, option="--teacher")
        check_causal(str(folder), self._model, option="--teacher")
        packed = [dataset for dataset in datasets if packed_length(dataset.spec) is not None]
        if packed:
            block_at_joints(
                str(folder),
                self._model,
                packed[0].path,
                length=packed[0].spec.sequence_length,
                autocast=nullcontext(),
                option="--teacher",
            )
        self._model.requires_grad_(False)
        self._vocab_size = datasets[0].spec.tokenizer.vocab_size

    def loss_of(
        self, objective: Objective, seen: Seen | None = None
    ) -> Callable[[PreTrainedModel, Batch], Loss]:
        """The summed loss of a student against this teacher; `seen` is that of `batch_loss`."""
        loss = partial(batch_loss, objective=objective, seen=seen)
        if not objective.alpha:
            return loss
        return lambda student, batch: loss(student, self.with_targets(batch))

    @torch.no_grad()
    def with_targets(self, batch: Batch) -> Batch:
        """A batch on the teacher's device, with all entries of the vocabulary at each position."""
        with torch.autocast(batch.labels.device.type, enabled=False):
            logits = self._model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).logits
        logprobs = logits[..., : self._vocab_size].float().log_softmax(-1).flatten(0, 1)
        return replace(batch, entries=_all_entries(logprobs))


def _all_entries(logprobs: Tensor) -> KeptEntries:
    """logprobs [N, V] of every id."""
    positions, vocab_size = logprobs.shape
    ids = torch.arange(vocab_size, dtype=torch.int32, device=logprobs.device)
    return KeptEntries(
        offsets=torch.arange(positions + 1, device=logprobs.device) * vocab_size,
        ids=torch.cat([ids.repeat(positions), torch.zeros_like(ids)]),
        logprobs=torch.cat([logprobs.flatten(), logprobs.new_full((vocab_size,), -math.inf)]),
        max_entries=vocab_size,
    )
