"""Top-p-k of a block of logits, on whatever device the logits are on.

Letters: T positions of the block, V vocabulary, K the most entries a position can keep.

The tail is the sum of the unkept entries themselves. `1 - kept mass` would lose a tail of 1e-7, an
ordinary one after a token the teacher is sure of.
"""

from __future__ import annotations

import torch

from shards.keep import TopPK
from teacher_dump.keep.groups import Workspace
from teacher_dump.keep.packed import (
    empty_packed,
    order_entries,
    steps_below_zero,
    write_entries,
    write_header,
)
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.sweep import Sweeper, places_of_top


def smallest_prefix(mass: torch.Tensor, top_p: float) -> torch.Tensor:
    """mass [T, K], largest first -> [T, K] bool: entries before which less than `top_p` lies."""
    kept = (mass.cumsum(-1) - mass) < top_p
    kept[:, 0] = True
    return kept


class TopPKSelector:
    """Selects block after block; holds the work buffers."""

    def __init__(self, keep: TopPK, vocab_size: int) -> None:
        self.selection = Selection(keep, vocab_size)
        self._keep = keep
        self._workspace = Workspace(vocab_size)
        self._sweep = Sweeper(by_sets=True)

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """See `Selector.__call__`; nothing is random here, so the keys are not looked at."""
        keep = self._keep
        swept = self._sweep(self._workspace.whole_groups(logits))
        sets, columns = swept.leading_sets(keep.top_k)
        candidates = swept.at(columns)
        places = places_of_top(candidates, self.selection.max_entries)
        values = candidates.gather(1, places)
        masses = swept.mass(candidates)
        mass = masses.gather(1, places)
        kept = smallest_prefix(mass / swept.total, keep.top_p)
        tail = masses.scatter_(1, places, mass.masked_fill(kept, 0.0)).sum(-1)
        tail += swept.part_mass.scatter_(1, sets, 0.0).sum(-1)

        packed = empty_packed(len(logits), self.selection, logits.device)
        write_header(
            packed,
            kept.sum(-1),
            swept.at(labels[:, None])[:, 0] - swept.log_total,
            swept.entropy,
            (tail / swept.total[:, 0]).log(),
        )
        steps = steps_below_zero(values - swept.log_total[:, None], keep.logprob_step)
        steps, ids = order_entries(steps, columns.gather(1, places), kept)
        write_entries(packed, ids, steps.to(torch.float32) * -keep.logprob_step)
        return packed
