"""A block of logits -> what is kept of each position, by the method asked for."""

from __future__ import annotations

from functools import singledispatch
from typing import Protocol

import torch

from shards.keep import Draws, Keep, Threshold, TopPK
from teacher_dump.keep.groups import GROUP
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.sampling import SamplingSelector
from teacher_dump.keep.top_p_k import TopPKSelector

# Logits of a block. 96 MiB are 512 rows of a vocabulary of 49,152; on 2 cores of an AMD EPYC a row
# takes 45, 34 and 39 us by 512 rows (top-p-k, draws, threshold), 52, 38 and 46 by 256, and 56, 43
# and 52 by 128. The best size for a GPU has not been measured.
CPU_SELECTION_BYTES = 96 << 20
GPU_SELECTION_BYTES = 1 << 30


class Selector(Protocol):
    """Makes everything that a row of a shard needs in one pass over a block of logits.

    That is: the kept ids and log-probabilities, the mass that was not kept, the label's
    log-probability and the entropy.
    """

    @property
    def selection(self) -> Selection:
        """What is selected: the method and the vocabulary."""
        ...

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """logits [T, >= V], labels, keys [T] int64 -> packed [T, 4 + 2 K] int32, see `packed`.

        `keys` are the positions' random keys, see `random_keys`. The logits are left as they are.
        """
        ...


def select_in_blocks(
    select: Selector,
    logits: torch.Tensor,
    labels: torch.Tensor,
    keys: torch.Tensor,
    rows: int | None = None,
) -> torch.Tensor:
    """Run a selector over any number of positions [T], in blocks of about equal size.

    A block has at most `rows` rows, or `rows_at_once` if that is None.
    """
    rows = rows_at_once(logits, select.selection) if rows is None else rows
    blocks = max(1, -(-len(logits) // rows))
    columns = (torch.tensor_split(column, blocks) for column in (logits, labels, keys))
    return torch.cat([select(*block) for block in zip(*columns, strict=True)])


def rows_at_once(logits: torch.Tensor, selection: Selection) -> int:
    """How many rows of logits [T, V] to give a selector at once, by the memory of a row.

    That is its logits in float32, or the groups that sampling looks at.
    """
    block_bytes = CPU_SELECTION_BYTES if logits.device.type == "cpu" else GPU_SELECTION_BYTES
    return max(1, block_bytes // (4 * max(logits.shape[1], 3 * GROUP * selection.max_entries)))


def selector_of(selection: Selection) -> Selector:
    """The selector of a method and a vocabulary; it works on one device at a time."""
    return make_selector(selection.keep, selection.vocab_size)


@singledispatch
def make_selector(keep: Keep, vocab_size: int) -> Selector:
    """The selector of a method, by its type; `make_selector.register` adds that of another."""
    raise TypeError(f"nothing selects by {keep}")


make_selector.register(TopPK, TopPKSelector)
make_selector.register(Draws, SamplingSelector)
make_selector.register(Threshold, SamplingSelector)
