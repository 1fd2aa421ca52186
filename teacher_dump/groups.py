"""A vocabulary in parts: what is looked for is narrowed down to a few parts first.

Groups are 64 columns that lie side by side, for what is looked up by mass.

For the k largest values there are interleaved sets: of S columns, set i < S / 8 has the members
i + j S / 8, so that the maxima of all sets are those of 8 rows; on a CPU that takes half the time
of 64 columns side by side. The k largest values lie in the k sets with the largest maxima, and
these maxima in k sets of sets likewise.

Letters: T positions of a block, V vocabulary rounded up to whole groups, N parts looked at.
"""

from __future__ import annotations

import torch

GROUP = 64
MEMBERS = 8  # of an interleaved set; groups are whole sets of sets

# Padding of the last group, and ids that a model lacks: their probability is 0, and 0 * -1e4 too,
# unlike 0 * -inf.
IMPOSSIBLE = -1e4


class Workspace:
    """The work buffers of a selector, so that a block allocates nothing large.

    On a CPU a fresh buffer of the size of the logits costs page faults as dear as the arithmetic.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._buffers: dict[str, torch.Tensor] = {}

    def buffer(self, name: str, num_rows: int, device: torch.device) -> torch.Tensor:
        """[T, V] float32 with the contents of earlier blocks."""
        padded = -(-self._vocab_size // GROUP) * GROUP
        have = self._buffers.get(name)
        if have is None or have.shape[0] < num_rows or have.device != device:
            have = torch.empty((num_rows, padded), dtype=torch.float32, device=device)
            self._buffers[name] = have
        return have[:num_rows]

    def whole_groups(self, logits: torch.Tensor) -> torch.Tensor:
        """[T, any] -> [T, V] float32; a view where the logits are that already.

        Columns beyond the vocabulary are left out; those that a model has not got, whose tokenizer
        is longer, are impossible.
        """
        vocab = self._vocab_size
        if logits.dtype == torch.float32 and logits.shape[1] == vocab and vocab % GROUP == 0:
            return logits.contiguous()
        padded = self.buffer("logits", logits.shape[0], logits.device)
        columns = min(vocab, logits.shape[1])
        padded[:, :columns] = logits[:, :columns]
        padded[:, columns:] = IMPOSSIBLE
        return padded


def take_groups(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[T, V], group numbers [T, N] -> [T, N * GROUP]; whole rows, unlike `gather`."""
    num_rows = values.shape[0]
    num_groups = values.shape[1] // GROUP
    first = torch.arange(num_rows, device=values.device)[:, None] * num_groups
    rows = values.view(-1, GROUP).index_select(0, (first + groups).view(-1))
    return rows.view(num_rows, -1)


def largest(
    values: torch.Tensor, maxima: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of every row of [T, V]: values, largest first, and columns, both [T, k].

    `maxima` [T, V / 8] are those of the sets of 8.
    """
    num_sets = maxima.shape[1]
    num_large = num_sets // MEMBERS
    of_large = maxima.view(len(maxima), MEMBERS, num_large).amax(1)
    large = torch.topk(of_large, min(k, num_large), dim=-1, sorted=False)[1]
    sets = _members(large, num_large)
    best = torch.topk(maxima.gather(1, sets), min(k, sets.shape[1]), dim=-1, sorted=False)[1]
    columns = _members(sets.gather(1, best), num_sets)
    found, order = torch.topk(values.gather(1, columns), k, dim=-1)
    return found, columns.gather(1, order)


def _members(sets: torch.Tensor, num_sets: int) -> torch.Tensor:
    """Numbers of sets [T, N] of `num_sets` -> their members [T, N * 8]."""
    steps = torch.arange(MEMBERS, device=sets.device) * num_sets
    return (sets[:, :, None] + steps).view(len(sets), -1)
