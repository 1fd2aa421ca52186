"""A keep method that somebody adds outside of the project: the largest entries of odd ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from shards.keep import Keep
from shards.options import check, option
from teacher_dump.keep.packed import empty_packed, order_entries, write_entries, write_header
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.selection import make_selector


@dataclass(frozen=True, kw_only=True)
class OddTop(Keep):
    """Keep the `most` largest entries whose id is odd, at steps of 1/8 nat."""

    method: ClassVar[str] = "odd-top"
    has_tail: ClassVar[bool] = True

    most: int = option("Entries to keep of each position.", default=3)
    logprob_step = 1 / 8

    def __post_init__(self) -> None:
        check(self.most >= 1, "most", self.most, "at least 1")

    def max_entries(self, vocab_size: int) -> int:
        return min(self.most, vocab_size // 2)


class OddTopSelector:
    """See `teacher_dump.keep.selection.Selector`."""

    def __init__(self, keep: OddTop, vocab_size: int) -> None:
        self.selection = Selection(keep, vocab_size)

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        logprobs = torch.log_softmax(logits[:, : self.selection.vocab_size].float(), -1)
        values, places = logprobs[:, 1::2].topk(self.selection.max_entries)
        ids = 2 * places + 1
        tail = (1 - values.exp().sum(-1)).clamp(min=1e-9).log()
        steps = (values * -8).round().long()
        kept = torch.ones_like(ids, dtype=torch.bool)
        steps, ids = order_entries(steps, ids, kept)
        packed = empty_packed(len(logits), self.selection, logits.device)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        label_logprobs = logprobs.gather(1, labels[:, None])[:, 0]
        write_header(packed, kept.sum(-1), label_logprobs, entropy, tail)
        write_entries(packed, ids, steps.float() / -8)
        return packed


make_selector.register(OddTop, OddTopSelector)
