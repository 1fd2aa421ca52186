"""One sequence of a dataset, position by position.

Letters: n tokens, T = n - 1 labelled positions, V vocabulary. Position t predicts `tokens[t + 1]`
from `tokens[0 .. t]`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

from shards import schema
from shards.errors import ShardError
from shards.rows import BoolArray, Float32Array, Int32Array
from shards.rows import Row as FlatRow
from shards.spec import DatasetSpec

_Scalar = TypeVar("_Scalar", bound=np.generic)
_Values = TypeVar("_Values")


class Ragged(Sequence[npt.NDArray[_Scalar]], Generic[_Scalar]):
    """Arrays of different lengths that lie end to end: index t is a view of the values of t.

    A slice gives the same for some of the positions; nothing is copied. IndexError as for a list.
    """

    def __init__(
        self,
        values: npt.NDArray[_Scalar],
        starts: npt.NDArray[np.signedinteger],
        stops: npt.NDArray[np.signedinteger],
    ) -> None:
        """Position t has `values[starts[t] : stops[t]]`; starts and stops are [T]."""
        self._values = values
        self._starts = starts
        self._stops = stops

    @property
    def counts(self) -> npt.NDArray[np.signedinteger]:
        """The length of each array, [T]."""
        return self._stops - self._starts

    @property
    def flat(self) -> npt.NDArray[_Scalar]:
        """All values end to end, [sum of counts]: a view if they lie so, else a copy."""
        if not len(self):
            return self._values[:0]
        if np.array_equal(self._starts[1:], self._stops[:-1]):
            return self._values[self._starts[0] : self._stops[-1]]
        return np.concatenate(list(self))

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, t: int) -> npt.NDArray[_Scalar]: ...

    @overload
    def __getitem__(self, t: slice) -> Ragged[_Scalar]: ...

    def __getitem__(self, t: int | slice) -> npt.NDArray[_Scalar] | Ragged[_Scalar]:
        if isinstance(t, slice):
            return Ragged(self._values, self._starts[t], self._stops[t])
        t = _index(t, len(self))
        return self._values[self._starts[t] : self._stops[t]]

    def __iter__(self) -> Iterator[npt.NDArray[_Scalar]]:
        for start, stop in zip(self._starts, self._stops, strict=True):
            yield self._values[start:stop]

    def __repr__(self) -> str:
        return f"<Ragged {self._values.dtype}: {len(self)} positions, {self.counts.sum()} values>"


@dataclass(frozen=True, eq=False, repr=False)
class Row:
    """One sequence; `len(row)` is T, its number of labelled positions. Log-values are in nats.

    Arrays are read-only views of the row group in memory. Copy those that you keep for long, or the
    whole row group stays in memory. In a dataset of tokens alone, the teacher's attributes raise
    ShardError.

    `spec` is the dataset's, `stored` what the shard holds.
    """

    stored: FlatRow
    spec: DatasetSpec

    @property
    def sequence(self) -> int:
        """The number of the sequence in its split."""
        return self.stored.sequence

    @property
    def tokens(self) -> Int32Array:
        """Token ids [n] int32; `tokens[t + 1]` is the label of position t."""
        return self.stored.tokens

    @property
    def segments(self) -> Int32Array:
        """Which document of the sequence each token belongs to, [n] int32, from 0."""
        return self.stored.segments

    @cached_property
    def loss_mask(self) -> BoolArray | None:
        """Which labels count, [T]; None: all do. Other positions have no entries."""
        mask = self.stored.loss_mask
        if mask is not None:  # Arrow's bits unpacked, so the one column that is not read-only
            mask = mask.view()
            mask.flags.writeable = False
        return mask

    @cached_property
    def ids(self) -> Ragged[np.int32]:
        """`ids[t]` are the vocabulary ids of the entries at position t.

        The entry with the largest value comes first.
        """
        return self._entries(schema.IDS, self.stored.ids)

    @cached_property
    def logprobs(self) -> Ragged[np.float32]:
        """`logprobs[t]` are the log-probabilities of `ids[t]`.

        Sampling keep methods store the logarithms of weights here; see `dense`.
        """
        return self._entries(schema.LOGPROBS, self.stored.logprobs)

    @property
    def label_logprobs(self) -> Float32Array:
        """The teacher's log-probability of every label, [T] float32."""
        return self._of_teacher(schema.LABEL_LOGPROBS, self.stored.label_logprobs)

    @property
    def tail_logmass(self) -> Float32Array | None:
        """The logarithm of the mass that was not stored, [T] float32, -inf for none of it.

        None for sampling keep methods, which have no such mass.
        """
        self._require_teacher(schema.TAIL_LOGMASS)
        return self.stored.tail_logmass

    @property
    def entropies(self) -> Float32Array | None:
        """The entropy of the teacher's full distribution, [T] float32.

        0 where `loss_mask` is false. None if the engine did not see the full distribution.
        """
        self._require_teacher(schema.ENTROPIES)
        return self.stored.entropies

    def dense(self, t: int, vocab_size: int | None = None) -> npt.NDArray[np.float64]:
        """What is stored at position t as an array over the vocabulary, [V] float64.

        A truncating method (`top-p-k`): the stored probabilities, and the mass that is missing
        spread evenly over the other ids. The sum is 1 up to the rounding of what is stored: every
        probability, the missing mass too, is off by a factor of at most
        exp(logprob_step / 2), 1.032 at the default step.

        A sampling method (`draws`, `threshold`): the weights as they are, 0 elsewhere. Only their
        expectation is the teacher's probability (at `spec.keep.temperature`); they do not sum to 1.

        All 0 where `loss_mask` is false: nothing is stored there.

        `vocab_size` is V, by default `spec.tokenizer.vocab_size`; a larger one, of a model whose
        head is padded, adds zeros. ValueError for a smaller one, IndexError for a position out
        of range, ShardError for a dataset of tokens alone.
        """
        ids, logprobs = self.ids[t], self.logprobs[t]
        known = self.spec.tokenizer.vocab_size
        size = known if vocab_size is None else operator.index(vocab_size)
        if size < known:
            raise ValueError(f"vocab_size {size}: the dataset's tokenizer has {known} ids")
        values = np.zeros(size, np.float64)
        counts = self.loss_mask is None or self.loss_mask[t]
        if self.tail_logmass is not None and counts and len(ids) < known:
            values[:known] = np.exp(np.float64(self.tail_logmass[t])) / (known - len(ids))
        values[ids] = np.exp(logprobs, dtype=np.float64)
        return values

    def __len__(self) -> int:
        return len(self.tokens) - 1

    def __repr__(self) -> str:
        entries = "" if self.stored.ids is None else f", {len(self.stored.ids):,} entries"
        return f"<Row {self.sequence:,}: {len(self):,} labelled positions{entries}>"

    def _entries(self, name: str, values: npt.NDArray[_Scalar] | None) -> Ragged[_Scalar]:
        """Flat values of all positions by position."""
        values = self._of_teacher(name, values)
        starts, stops = self._bounds
        return Ragged(values, starts, stops)

    @cached_property
    def _bounds(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where the entries of every position start and stop, [T] each."""
        counts = self._of_teacher(schema.IDS, self.stored.counts)
        stops = np.cumsum(counts, dtype=np.int64)
        return stops - counts, stops

    def _of_teacher(self, name: str, values: _Values | None) -> _Values:
        self._require_teacher(name)
        assert values is not None  # of a dataset that has a teacher
        return values

    def _require_teacher(self, name: str) -> None:
        if not self.spec.has_teacher:
            raise ShardError(
                f"no {name}: the dataset stores tokens alone (keep method"
                f" {self.spec.keep.method!r}), nothing of a teacher"
            )


def _index(t: int, length: int) -> int:
    """An index from the front, for one that may be negative. IndexError outside."""
    number = operator.index(t)
    if not -length <= number < length:
        raise IndexError(f"position {number} of {length}")
    return number % length
