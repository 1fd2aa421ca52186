"""One training sequence in memory, as the teacher pass makes it and as a shard gives it back.

Letters: n tokens, T = n - 1 labelled positions, E kept entries of all positions together.

Entries are ragged, so they lie flat beside a count per position: no padding, no Python objects.
Position t holds the teacher's distribution over `tokens[t + 1]` given `tokens[0 .. t]`. The shift
by one is in the row itself and nothing downstream shifts again.
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
    """One sequence: tokens [n] int32, entries [E] flat over T = n - 1 positions, sums in nats.

    `counts[t]` entries belong to position t, largest log-probability first, equal values by
    ascending id. `tail_logmass` is None for sampled keep methods, `loss_mask` is None where every
    position counts. `teacher_nll` and `teacher_entropy` are sums over the row's counted positions;
    `teacher_entropy` is None where the engine did not see the whole distribution.
    """

    sequence: int
    tokens: Int32Array
    segments: Int32Array
    counts: Int32Array
    ids: Int32Array
    logprobs: Float32Array
    tail_logmass: Float32Array | None
    label_logprobs: Float32Array
    loss_mask: BoolArray | None = None
    teacher_nll: float
    teacher_entropy: float | None
