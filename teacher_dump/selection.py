"""A block of logits -> what is kept of each position, by the method asked for."""

from __future__ import annotations

from typing import Protocol

import torch

from teacher_dump.keep import Draws, Keep, Threshold, TopPK
from teacher_dump.sampling import SamplingSelector
from teacher_dump.top_p_k import TopPKSelector


class Selector(Protocol):
    """Makes everything that a row of a shard needs in one pass over a block of logits.

    That is: the kept ids and log-probabilities, the mass that was not kept, the label's
    log-probability and the entropy.
    """

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """logits [T, >= V], labels, keys [T] int64 -> packed [T, 4 + 2 K] int32, see `packing`.

        `keys` are the positions' random keys, see `random_keys`. The logits are left as they are.
        """
        ...


def select_in_blocks(
    select: Selector, logits: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor, rows: int
) -> torch.Tensor:
    """What a selector makes of any number of positions [T], so many rows at a time."""
    columns = (torch.split(column, rows) for column in (logits, labels, keys))
    return torch.cat([select(*block) for block in zip(*columns, strict=True)])


def make_selector(keep: Keep) -> Selector:
    """The selector of a method; it works on one device at a time."""
    if isinstance(keep, TopPK):
        return TopPKSelector(keep)
    if isinstance(keep, Draws | Threshold):
        return SamplingSelector(keep)
    raise TypeError(f"no selector for {keep}")
