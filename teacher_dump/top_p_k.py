"""Top-p-k of a block of logits, on whatever device the logits are on.

Letters: T positions of the block, V vocabulary, K the most entries a position can keep.

The tail is the sum of the unkept entries themselves. `1 - kept mass` would lose a tail of 1e-7, an
ordinary one after a token the teacher is sure of.
"""

from __future__ import annotations

import torch

from teacher_dump.groups import Workspace, largest
from teacher_dump.keep import TopPK
from teacher_dump.packing import (
    empty_packed,
    order_entries,
    steps_below_zero,
    write_entries,
    write_header,
)
from teacher_dump.sweep import sweep


def smallest_prefix(mass: torch.Tensor, top_p: float) -> torch.Tensor:
    """mass [T, K], largest first -> [T, K] bool: entries before which less than `top_p` lies."""
    kept = (mass.cumsum(-1) - mass) < top_p
    kept[:, 0] = True
    return kept


class TopPKSelector:
    """Selects block after block; holds the work buffers."""

    def __init__(self, keep: TopPK) -> None:
        self.keep = keep
        self._workspace = Workspace(keep.vocab_size)

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """See `Selector.__call__`; nothing is random here, so the keys are not looked at."""
        keep, num_rows = self.keep, logits.shape[0]
        logits = self._workspace.whole_groups(logits)
        swept = sweep(logits, self._workspace)
        values, ids = largest(logits, swept.maxima, min(keep.top_k, keep.vocab_size))
        exps = swept.exps.gather(1, ids)
        kept = smallest_prefix(exps / swept.total, keep.top_p)
        tail = swept.exps.scatter_(1, ids, torch.where(kept, 0.0, exps)).sum(-1)

        packed = empty_packed(num_rows, keep, logits.device)
        write_header(
            packed,
            kept.sum(-1),
            logits.gather(1, labels[:, None])[:, 0] - swept.log_total,
            swept.entropy,
            (tail / swept.total[:, 0]).log(),
        )
        steps = steps_below_zero(values - swept.log_total[:, None], keep.logprob_step)
        steps, ids = order_entries(steps, ids, kept)
        write_entries(packed, ids, steps.to(torch.float32) * -keep.logprob_step)
        return packed
