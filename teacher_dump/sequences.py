"""Token store -> numbered sequences; the shift by one is prepared here, once.

A split's documents lie end to end. How they are cut is one of two ways:

- joined: sequence s is the `L + 1` tokens from position `s * L`. It overlaps the next by one, so
  that every position but a split's very last has a label. Only the last sequence may be shorter.
- separate: each document is cut like that by itself, so that nothing is predicted from another
  document, and its first token is nobody's label. The last sequence of every document may be
  shorter.

No sequence has under two tokens. Number and content depend on the token store and L alone, so any
machine can make any sequence, in any order, at any time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.row_group import Int64Array
from shards.rows import BoolArray, Int32Array

# Separate documents are counted once and found again from every so manieth of them: 8 bytes of
# memory per 4,096 documents, and as many to look through for a sequence.
_DOCUMENTS_PER_MARK = 4096


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


class SplitSequences(ABC):
    """The sequences of one split, addressed by number in O(log documents).

    `tokens` [N], `document_starts` [documents] and `label_mask` [N], which tokens count as labels,
    may be memory maps: nothing is copied but the sequence asked for.
    """

    def __init__(
        self,
        *,
        split: str,
        tokens: npt.NDArray[Any],
        document_starts: Int64Array,
        sequence_length: int,
        label_mask: BoolArray | None = None,
    ) -> None:
        self.split = split
        self._tokens = tokens
        self._document_starts = document_starts
        self._label_mask = label_mask
        self._length = sequence_length

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def positions_of(self, num_sequences: int) -> int:
        """Labelled positions of the first `num_sequences` sequences together."""

    @abstractmethod
    def _span(self, number: int) -> tuple[int, int]:
        """Where the tokens of a sequence begin and end in the split's."""

    @property
    def num_positions(self) -> int:
        """Labelled positions of the split."""
        return self.positions_of(len(self))

    @property
    def mean_positions(self) -> int:
        """Labelled positions of most sequences, by which shards are laid out."""
        return self._length

    def sequences_within(self, num_positions: int) -> int:
        """How many sequences from the front have at most so many labelled positions together."""
        return bisect_right(range(len(self) + 1), num_positions, key=self.positions_of) - 1

    def __getitem__(self, number: int) -> TokenSequence:
        if not 0 <= number < len(self):
            raise IndexError(f"{self.split} has {len(self)} sequences, not number {number}")
        start, stop = self._span(number)
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


class JoinedSequences(SplitSequences):
    """Sequences that go on over the ends of documents: all full but the last."""

    def __len__(self) -> int:
        return -(-max(0, len(self._tokens) - 1) // self._length)

    def positions_of(self, num_sequences: int) -> int:
        return max(0, min(num_sequences * self._length, len(self._tokens) - 1))

    def _span(self, number: int) -> tuple[int, int]:
        start = number * self._length
        return start, min(start + self._length + 1, len(self._tokens))


class SeparateSequences(SplitSequences):
    """Sequences of one document each; a document of a single token has none."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Sequences before every so manieth document, and before the end.
        marks = [0]
        for first in range(0, len(self._document_starts), _DOCUMENTS_PER_MARK):
            marks.append(marks[-1] + int(self._sequences_of(first).sum()))
        self._marks = np.array(marks, np.int64)

    def __len__(self) -> int:
        return int(self._marks[-1])

    @property
    def mean_positions(self) -> int:
        """The mean of all, rounded up; L without any sequence."""
        return -(-self.num_positions // len(self)) if len(self) else self._length

    def positions_of(self, num_sequences: int) -> int:
        if num_sequences >= len(self):
            return len(self._tokens) - len(self._document_starts)
        document, start, _ = self._locate(num_sequences)
        return start - document  # one position less than tokens in every document before

    def _span(self, number: int) -> tuple[int, int]:
        _, start, end = self._locate(number)
        return start, min(start + self._length + 1, end)

    def _locate(self, number: int) -> tuple[int, int, int]:
        """Document, beginning of the sequence, end of the document, for a sequence there is."""
        mark = int(np.searchsorted(self._marks, number, side="right")) - 1
        ends = np.cumsum(self._sequences_of(mark * _DOCUMENTS_PER_MARK)) + self._marks[mark]
        in_block = int(np.searchsorted(ends, number, side="right"))
        piece = number - int(ends[in_block - 1] if in_block else self._marks[mark])
        document = mark * _DOCUMENTS_PER_MARK + in_block
        bounds = self._bounds(document, 1)
        return document, int(bounds[0]) + piece * self._length, int(bounds[1])

    def _sequences_of(self, first: int) -> Int64Array:
        """Sequences of each document between two marks."""
        positions = np.diff(self._bounds(first, _DOCUMENTS_PER_MARK)) - 1
        return -(-positions // self._length)

    def _bounds(self, first: int, count: int) -> Int64Array:
        """Beginnings of some documents and the end of the last."""
        bounds = np.asarray(self._document_starts[first : first + count + 1])
        if first + count >= len(self._document_starts):
            bounds = np.append(bounds, len(self._tokens))
        return bounds


def cut(*, joined: bool, **options: Any) -> SplitSequences:
    """The sequences of a split, `joined` or of separate documents; options of `SplitSequences`."""
    return (JoinedSequences if joined else SeparateSequences)(**options)
