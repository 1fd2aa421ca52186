"""A vocabulary in groups of 64: what is looked for is narrowed down to a few groups first.

The k largest values lie in the k groups with the largest maxima: 64 columns become one, and then 8
candidates one.

Letters: T positions of a block, V vocabulary rounded up to whole groups, N groups looked at.
"""

from __future__ import annotations

import torch

GROUP = 64
_SUBGROUP = 8

# Padding of the last group: its probability is 0, and 0 * -1e4 too, unlike 0 * -inf.
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
        """[T, >= vocab_size] -> [T, V] float32; a view where the logits are that already."""
        vocab = self._vocab_size
        if logits.dtype == torch.float32 and logits.shape[1] == vocab and vocab % GROUP == 0:
            return logits.contiguous()
        padded = self.buffer("logits", logits.shape[0], logits.device)
        padded[:, :vocab] = logits[:, :vocab]
        padded[:, vocab:] = IMPOSSIBLE
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

    `maxima` [T, V / 64] are those of the groups.
    """
    groups = torch.topk(maxima, min(k, maxima.shape[1]), dim=-1, sorted=False)[1]
    found, places = _top_of_candidates(take_groups(values, groups), k)
    return found, groups.gather(1, places // GROUP) * GROUP + places % GROUP


def _top_of_candidates(candidates: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, C] -> the k largest values [T, k], largest first, and their places in C [T, k]."""
    num_rows, num_candidates = candidates.shape
    stride = num_candidates // _SUBGROUP
    maxima = candidates.view(num_rows, _SUBGROUP, stride).amax(1)
    best = torch.topk(maxima, min(k, stride), dim=-1, sorted=False)[1]
    members = torch.arange(_SUBGROUP, device=candidates.device) * stride
    places = (best[:, :, None] + members).view(num_rows, -1)
    values, order = torch.topk(candidates.gather(1, places), k, dim=-1)
    return values, places.gather(1, order)
