"""Kept entries to and from rectangles, in which tests say what they mean."""

from __future__ import annotations

import torch
from torch import Tensor

from student_train.data.batches import Batch
from student_train.objective.distillation import Targets
from student_train.objective.kept_entries import KeptEntries


def make_entries(ids: Tensor, logprobs: Tensor) -> KeptEntries:
    """Of rectangles [N, K]: every entry whose logprob is above -inf."""
    kept = logprobs > float("-inf")
    counts = kept.sum(1)
    most = ids.shape[1]
    return KeptEntries(
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        ids=torch.cat([ids[kept].int(), torch.zeros(most, dtype=torch.int32)]),
        logprobs=torch.cat([logprobs[kept], torch.full((most,), -torch.inf)]),
        max_entries=most,
    )


def make_targets(
    ids: Tensor,
    logprobs: Tensor,
    tail_logmass: Tensor | None = None,
    entropies: Tensor | None = None,
) -> Targets:
    """Targets of rectangles [T, K], see `make_entries`."""
    return Targets(make_entries(ids, logprobs), tail_logmass, entropies)


def with_dtype(targets: Targets, dtype: torch.dtype) -> Targets:
    """The same targets, logprobs and tails in another floating type."""
    entries, tail, entropies = targets
    return Targets(
        entries._replace(logprobs=entries.logprobs.to(dtype)),
        None if tail is None else tail.to(dtype),
        None if entropies is None else entropies.to(dtype),
    )


def all_padded(entries: KeptEntries) -> tuple[Tensor, Tensor]:
    """ids [N, K] int32 and logprobs [N, K] of all positions."""
    return entries.padded(torch.arange(len(entries.offsets) - 1))


def batch_entries(batch: Batch) -> tuple[Tensor, Tensor]:
    """ids and logprobs [B, L, K] of a batch that has them."""
    assert batch.entries is not None
    shape = (*batch.labels.shape, batch.entries.max_entries)
    ids, logprobs = all_padded(batch.entries)
    return ids.view(shape), logprobs.view(shape)
