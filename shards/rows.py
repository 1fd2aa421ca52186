"""One training sequence in memory, as the teacher pass makes it and as a shard gives it back.

Letters: n tokens, T = n - 1 labelled positions, E kept entries of all positions together.

Entries are ragged: a flat array, and a count per position. There is no padding and no Python object
per entry. Position t holds the teacher's distribution over `tokens[t + 1]` given `tokens[0 .. t]`.
The row itself contains this shift by one, and no later code shifts again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence: tokens [n] int32, entries [E] flat over T = n - 1 positions, in nats.

    `counts[t]` entries belong to position t, largest log-probability first, equal values by
    ascending id. `entropies` [T] are of the teacher's full distribution at each position.
    `teacher_nll` and `teacher_entropy` are sums over the positions that count.

    These are None: `tail_logmass` for sampling keep methods, the entropies for engines that do not
    see the whole distribution, everything of a teacher without one, `loss_mask` if every position
    counts.
    """

    sequence: int
    tokens: Int32Array
    segments: Int32Array
    counts: Int32Array | None = None
    ids: Int32Array | None = None
    logprobs: Float32Array | None = None
    tail_logmass: Float32Array | None = None
    label_logprobs: Float32Array | None = None
    entropies: Float32Array | None = None
    loss_mask: BoolArray | None = None
    teacher_nll: float | None = None
    teacher_entropy: float | None = None
