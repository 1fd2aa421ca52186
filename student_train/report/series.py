"""A figure over the tokens trained on, thinned while it is read.

However long a run is, its page must stay small and its memory flat. So neighbouring steps are
merged into buckets of equal numbers of steps, which keep their mean and their extremes: a curve is
the means, and a spike of one step in a million still shows in the band around it. When the buckets
are as many as allowed, pairs of them become one. Shorter series are exact.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Bucket:
    """Some neighbouring steps: their number, sums, and extremes of the value."""

    num: int
    tokens_sum: float
    value_sum: float
    low: float
    high: float

    @property
    def tokens(self) -> float:
        """Where the bucket lies on the axis of tokens: its mean."""
        return self.tokens_sum / self.num

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return self.value_sum / self.num


class Series:
    """At most `most` buckets of values over tokens, and the last value."""

    def __init__(self, most: int) -> None:
        assert most >= 2
        self.buckets: list[Bucket] = []
        self.last = 0.0
        self._most = most
        self._width = 1
        self._room = 0  # in the last bucket

    def add(self, tokens: float, value: float) -> None:
        """Add a value, of more tokens than those before."""
        self.last = value
        if not self._room and len(self.buckets) == self._most:
            self._merge_pairs()
        if not self._room:
            self.buckets.append(Bucket(1, tokens, value, value, value))
            self._room = self._width - 1
            return
        self._room -= 1
        bucket = self.buckets[-1]
        bucket.num += 1
        bucket.tokens_sum += tokens
        bucket.value_sum += value
        if value < bucket.low:
            bucket.low = value
        elif value > bucket.high:
            bucket.high = value

    @property
    def num(self) -> int:
        """How many values there are."""
        return sum(bucket.num for bucket in self.buckets)

    @property
    def sum(self) -> float:
        """The sum of all values."""
        return sum(bucket.value_sum for bucket in self.buckets)

    @property
    def mean(self) -> float:
        """The mean of all values."""
        return self.sum / self.num

    @property
    def high(self) -> float:
        """The largest of all values."""
        return max(bucket.high for bucket in self.buckets)

    @property
    def is_thinned(self) -> bool:
        """Whether buckets stand for more than one step."""
        return self._width > 1

    def _merge_pairs(self) -> None:
        merged = []
        for first, second in zip(self.buckets[::2], self.buckets[1::2], strict=False):
            merged.append(
                Bucket(
                    first.num + second.num,
                    first.tokens_sum + second.tokens_sum,
                    first.value_sum + second.value_sum,
                    min(first.low, second.low),
                    max(first.high, second.high),
                )
            )
        if len(self.buckets) % 2:
            merged.append(self.buckets[-1])
        self.buckets = merged
        self._width *= 2
        self._room = self._width - merged[-1].num
