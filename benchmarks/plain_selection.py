"""Top-p-k as one would write it down with torch's operations: a reference for speed and results."""

from __future__ import annotations

import torch

from shards.keep import TopPK
from teacher_dump.keep.packed import (
    empty_packed,
    order_entries,
    steps_below_zero,
    write_entries,
    write_header,
)
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.top_p_k import smallest_prefix


class PlainSelector:
    """See `teacher_dump.keep.selection.Selector`. It computes in the dtype of the logits."""

    def __init__(self, keep: TopPK, vocab_size: int) -> None:
        self.selection = Selection(keep, vocab_size)
        self._keep = keep

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """logits [T, >= V], labels, keys [T] int64 -> packed [T, 4 + 2 K] int32."""
        logprobs = torch.log_softmax(logits[:, : self.selection.vocab_size], -1)
        mass = logprobs.exp()
        entropy = -(mass * logprobs).sum(-1)
        values, ids = torch.topk(logprobs, self.selection.max_entries)
        kept = smallest_prefix(values.exp(), self._keep.top_p)
        tail = mass.scatter_(1, ids, values.exp().masked_fill(kept, 0)).sum(-1)
        packed = empty_packed(len(logits), self.selection, logits.device)
        label_logprobs = logprobs.gather(1, labels[:, None])[:, 0]
        write_header(packed, kept.sum(-1), label_logprobs, entropy, tail.log())
        steps = steps_below_zero(values, self._keep.logprob_step)
        steps, ids = order_entries(steps, ids, kept)
        write_entries(packed, ids, steps.to(torch.float32) * -self._keep.logprob_step)
        return packed
