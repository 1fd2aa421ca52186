"""Token store -> numbered sequences. This is the only place that prepares the shift by one.

A split's documents lie end to end. There are two ways to cut them into stretches:

- joined: stretch s begins at position s * L. Only the last may be shorter than L.
- separate: each document is cut like that by itself, so that nothing is predicted from another
  document. The last stretch of every document may be shorter.

And two ways to make a sequence of a stretch:

- without BOS: the stretch and the token after it, a label only, if it has one. So every position
  but the very last has a label, and the first token of a separate document is never predicted.
- with BOS: the beginning-of-sequence token and the stretch; all its tokens are labels. If the
  stretch begins with BOS itself, there is no second one. No token is a label in two sequences.

Every sequence has at least two tokens. Number and content depend only on the token store, L and
BOS, so any machine can make any sequence, in any order, at any time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.row_group import Int64Array
from shards.rows import BoolArray, Int32Array
from teacher_dump.keep.rows import TokenSequence

# How many joined stretches, or separate documents, lie between two marks from which others are
# found: 8 or 16 bytes of memory per mark.
_STRETCHES_PER_MARK = 4096
_DOCUMENTS_PER_BLOCK = 1024


class SplitSequences(ABC):
    """The sequences of one split, addressed by number in O(log documents).

    `tokens` [N], `document_starts` [documents] and `label_mask` [N], which tokens count as labels,
    may be memory maps: only a requested sequence is copied. `bos_token_id` is inserted before every
    sequence; None: no token.
    """

    def __init__(
        self,
        *,
        split: str,
        tokens: npt.NDArray[Any],
        document_starts: Int64Array,
        sequence_length: int,
        label_mask: BoolArray | None = None,
        bos_token_id: int | None = None,
    ) -> None:
        self.split = split
        self._bos = bos_token_id
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
        """How many sequences from the front have at most this many labelled positions together."""
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
        counted = None if mask is None else np.array(mask[start:stop])
        return self._sequence(
            number,
            self._tokens[start:stop].astype(np.int32),
            np.cumsum(segments, dtype=np.int32),
            counted,
        )

    def _sequence(
        self, number: int, tokens: Int32Array, segments: Int32Array, counted: BoolArray | None
    ) -> TokenSequence:
        """A sequence of a stretch of tokens [n], their documents and whether they count [n]."""
        if self._bos is not None:
            counted = np.ones(len(tokens), np.bool_) if counted is None else counted
            if tokens[0] != self._bos:
                tokens = np.concatenate([np.array([self._bos], np.int32), tokens])
                segments = np.concatenate([segments[:1], segments])
                counted = np.concatenate([[False], counted])
        return TokenSequence(
            split=self.split,
            number=number,
            tokens=tokens,
            segments=segments,
            loss_mask=None if counted is None else counted[1:],
        )


class JoinedSequences(SplitSequences):
    """Sequences that continue across the ends of documents: all full but the last."""

    def __len__(self) -> int:
        return -(-max(0, len(self._tokens) - 1) // self._length)

    def positions_of(self, num_sequences: int) -> int:
        return max(0, min(num_sequences * self._length, len(self._tokens) - 1))

    def _span(self, number: int) -> tuple[int, int]:
        start = number * self._length
        return start, min(start + self._length + 1, len(self._tokens))


class JoinedWithBos(SplitSequences):
    """Stretches of L tokens that continue across the ends of documents, each after BOS."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        num = -(-len(self._tokens) // self._length)
        if len(self._tokens) % self._length == 1 and self._tokens[-1] == self._bos:
            num -= 1  # of this last stretch nothing is left to predict
        self._num = num
        counts = [
            self._count_bos(first, min(first + _STRETCHES_PER_MARK, num))
            for first in range(0, num, _STRETCHES_PER_MARK)
        ]
        self._marks = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return self._num

    def positions_of(self, num_sequences: int) -> int:
        num = min(num_sequences, self._num)
        mark = num // _STRETCHES_PER_MARK
        begin_with_bos = self._marks[mark] + self._count_bos(mark * _STRETCHES_PER_MARK, num)
        return min(num * self._length, len(self._tokens)) - int(begin_with_bos)

    def _span(self, number: int) -> tuple[int, int]:
        start = number * self._length
        return start, min(start + self._length, len(self._tokens))

    def _count_bos(self, first: int, stop: int) -> int:
        """How many of these stretches begin with BOS."""
        starts = self._tokens[first * self._length : stop * self._length : self._length]
        return int(np.count_nonzero(starts == self._bos))


class SeparateSequences(SplitSequences):
    """Sequences of one document each; a document without a label has none."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._block: tuple[int, Int64Array, Int64Array, Int64Array] | None = None
        rows, positions = [0], [0]
        for block in range(-(-len(self._document_starts) // _DOCUMENTS_PER_BLOCK)):
            starts, _, labels = self._stretches(block)
            rows.append(rows[-1] + len(starts))
            positions.append(positions[-1] + int(labels.sum()))
        self._rows, self._positions = np.array(rows), np.array(positions)

    def __len__(self) -> int:
        return int(self._rows[-1])

    @property
    def mean_positions(self) -> int:
        """The mean of all, rounded up; L without any sequence."""
        return -(-self.num_positions // len(self)) if len(self) else self._length

    def positions_of(self, num_sequences: int) -> int:
        if num_sequences >= len(self):
            return int(self._positions[-1])
        block, offset = self._find(num_sequences)
        return int(self._positions[block] + self._stretches(block)[2][:offset].sum())

    def _span(self, number: int) -> tuple[int, int]:
        block, offset = self._find(number)
        starts, stops, _ = self._stretches(block)
        return int(starts[offset]), int(stops[offset])

    def _find(self, number: int) -> tuple[int, int]:
        """The block of documents that a sequence is of, and its number there."""
        block = int(np.searchsorted(self._rows, number, side="right")) - 1
        return block, number - int(self._rows[block])

    def _stretches(self, block: int) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Begin, end and number of labels of the stretches of a block of documents."""
        if self._block is None or self._block[0] != block:
            self._block = (block, *self._cut(block * _DOCUMENTS_PER_BLOCK))
        return self._block[1:]

    def _cut(self, first: int) -> tuple[Int64Array, Int64Array, Int64Array]:
        bounds = np.asarray(self._document_starts[first : first + _DOCUMENTS_PER_BLOCK + 1])
        if first + _DOCUMENTS_PER_BLOCK >= len(self._document_starts):
            bounds = np.append(bounds, len(self._tokens))
        # Without BOS the first token of a document is no label, so there is one label less.
        shared = int(self._bos is None)
        pieces = -(-(np.diff(bounds) - shared) // self._length)
        document = np.repeat(np.arange(len(pieces)), pieces)
        number = np.arange(len(document)) - (np.cumsum(pieces) - pieces)[document]
        starts = bounds[document] + number * self._length
        stops = np.minimum(starts + self._length + shared, bounds[document + 1])
        labels = stops - starts - shared
        if self._bos is not None:
            labels -= self._tokens[starts] == self._bos
        return starts[labels > 0], stops[labels > 0], labels[labels > 0]


def cut(*, joined: bool, bos_token_id: int | None = None, **options: Any) -> SplitSequences:
    """The sequences of a split, `joined` or of separate documents; options of `SplitSequences`."""
    if not joined:
        return SeparateSequences(bos_token_id=bos_token_id, **options)
    if bos_token_id is None:
        return JoinedSequences(**options)
    return JoinedWithBos(bos_token_id=bos_token_id, **options)
