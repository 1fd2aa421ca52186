"""Token store -> numbered sequences; the shift by one is prepared here, once.

A split's documents lie end to end. Sequence s is the `L + 1` tokens from position `s * L`: it
overlaps the next by one, so that every position but a split's very last has a label. The last
sequence may be shorter, never under two tokens. Number and content depend on the token store and L
alone, so any machine can make any sequence, in any order, at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.rows import BoolArray, Int32Array


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """tokens [n] int32 with 2 <= n <= L + 1; the teacher reads tokens[:-1] and predicts tokens[1:].

    `segments` [n] int32 numbers the documents of the sequence from 0; an end-of-document token
    belongs to the document it ends. `loss_mask` [n - 1] says which labels count, None: all.
    """

    split: str
    number: int
    tokens: Int32Array
    segments: Int32Array
    loss_mask: BoolArray | None = None


class SplitSequences:
    """The sequences of one split, addressed by number in O(log documents).

    `tokens` [N], `document_starts` [documents] and `label_mask` [N], which tokens count as labels,
    may be memory maps: nothing is copied but the sequence asked for.
    """

    def __init__(
        self,
        *,
        split: str,
        tokens: npt.NDArray[Any],
        document_starts: npt.NDArray[np.int64],
        sequence_length: int,
        label_mask: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        self.split = split
        self._tokens = tokens
        self._document_starts = document_starts
        self._label_mask = label_mask
        self._length = sequence_length

    @property
    def num_positions(self) -> int:
        """Labelled positions of the split: every token but the first is a label once."""
        return max(0, len(self._tokens) - 1)

    def __len__(self) -> int:
        return -(-self.num_positions // self._length)

    def positions_of(self, num_sequences: int) -> int:
        """Labelled positions of the first `num_sequences` sequences together."""
        return min(num_sequences * self._length, self.num_positions)

    def __getitem__(self, number: int) -> TokenSequence:
        if not 0 <= number < len(self):
            raise IndexError(f"{self.split} has {len(self)} sequences, not number {number}")
        start = number * self._length
        stop = min(start + self._length + 1, len(self._tokens))
        first = int(np.searchsorted(self._document_starts, start, side="right")) - 1
        last = int(np.searchsorted(self._document_starts, stop, side="left"))
        inner = np.asarray(self._document_starts[first + 1 : last]) - start
        segments = np.zeros(stop - start, dtype=np.int32)
        segments[inner] = 1
        mask = self._label_mask
        return TokenSequence(
            split=self.split,
            number=number,
            tokens=self._tokens[start:stop].astype(np.int32),
            segments=np.cumsum(segments, dtype=np.int32),
            loss_mask=None if mask is None else np.array(mask[start + 1 : stop]),
        )
