"""A vocabulary in parts, so that a search first narrows down to a few parts.

Groups are 64 columns that lie side by side, for what is looked up by mass.

For the k largest values there are interleaved sets: of S columns, set i < S / 8 has the members
i + j S / 8, so that the maxima of all sets are those of 8 rows; on a CPU that takes half the time
of 64 columns side by side.

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

    On a CPU the page faults of a fresh buffer of this size cost as much as the arithmetic.
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


def members(sets: torch.Tensor, num_sets: int) -> torch.Tensor:
    """Numbers of sets [T, N] of `num_sets` -> their members [T, N * 8]."""
    steps = torch.arange(MEMBERS, device=sets.device) * num_sets
    return (sets[:, :, None] + steps).view(len(sets), -1)
