"""Which of several datasets the next line of training comes from: a function of its number.

The fractional parts of n times the golden ratio fill the unit interval more evenly than those of
any other number (Weyl's sequence). A line comes from the dataset whose share of the interval
contains its fractional part. So after any number of lines, and in any stretch of them, every
dataset has had its share to within a few lines, and a run continues from a number. Integers modulo
2^64 make it exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # its fractional part times 2^64, odd
_LINES_AT_ONCE = 1024


def choices(weights: Sequence[float], *, seed: int, first_line: int) -> Iterator[int]:
    """Without end, from a line on: the number of the dataset that each line is of.

    `weights` are above 0 and need not sum to 1.
    """
    bounds = _bounds(weights)
    start = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(1)
    while True:
        numbers = np.arange(first_line, first_line + _LINES_AT_ONCE, dtype=np.uint64)
        places = numbers * _GOLDEN_RATIO + start  # modulo 2^64
        yield from np.searchsorted(bounds, places, side="right").tolist()
        first_line += _LINES_AT_ONCE


def order_seed(seed: int, dataset: int) -> int:
    """The seed of a dataset's order, that of the run for the first.

    With one seed for all, datasets of one size would be permuted in the same way, and two teachers'
    rows of one sequence would stand in one step.
    """
    if not dataset:
        return seed
    return int(np.random.SeedSequence((seed, dataset)).generate_state(1, np.uint64)[0])


def _bounds(weights: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Where the share of every dataset but the first begins, of 2^64."""
    ends = np.cumsum(np.array(weights) / sum(weights))[:-1]
    return np.array([min(int(end * 2.0**64), (1 << 64) - 1) for end in ends], np.uint64)
