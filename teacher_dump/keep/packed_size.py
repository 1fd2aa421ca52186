"""How many words a position's packed result takes: the keep method and the vocabulary decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shards.keep import Keep
from shards.spec import keep_from_json, keep_to_json

HEADER_WORDS = 4  # of a packed position: count, tail_logmass, label logprob, entropy


@dataclass(frozen=True)
class Selection:
    """What is selected from a block of logits.

    `vocab_size` is the tokenizer's length: columns beyond it are padding of the model and do not
    exist here.
    """

    keep: Keep
    vocab_size: int

    @property
    def max_entries(self) -> int:
        """K, the most entries that a position can have."""
        return self.keep.max_entries(self.vocab_size)

    @property
    def width(self) -> int:
        """int32 words of a packed position."""
        return HEADER_WORDS + 2 * self.max_entries

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` takes, for another process."""
        return {"keep": keep_to_json(self.keep), "vocab_size": self.vocab_size}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Selection:
        """The inverse of `to_json`."""
        return cls(keep_from_json(value["keep"]), int(value["vocab_size"]))
