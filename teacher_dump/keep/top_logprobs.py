"""Top-p-k from only the largest log-probabilities of each position, on the host.

Letters: T positions, K known entries of each, V vocabulary.

Selecting, rounding and ordering use the same functions as `top_p_k`. The mass that was not kept is
the sum of two parts: the known entries that were not kept, and 1 minus all known entries. The
second part has the error of the float32 sum that normalised the probabilities (up to 3e-5 on a CPU
at V = 49,152, tests/test_top_logprobs.py). But it lies between 0 and V - K times the smallest known
probability, and is clamped to these bounds. With one known entry more than can be kept, a tail is
therefore positive, and its error is at most the distance of the bounds.
"""

from __future__ import annotations

import torch

from shards.keep import TopPK
from shards.rows import Float32Array, Int32Array
from teacher_dump.keep.packed import Selected, order_entries, steps_below_zero
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.top_p_k import smallest_prefix


def num_known(selection: Selection) -> int:
    """K: one entry more than can be kept, if there is one."""
    return min(selection.max_entries + 1, selection.vocab_size)


def select_from_largest(
    ids: Int32Array, logprobs: Float32Array, label_logprobs: Float32Array, selection: Selection
) -> Selected:
    """ids, logprobs [T, K], largest first, label_logprobs [T], nats -> what is kept."""
    values = torch.from_numpy(logprobs)
    mass = values.double().exp()
    keep, k = selection.keep, selection.max_entries
    assert isinstance(keep, TopPK)  # the configuration refuses the others for this engine
    kept = smallest_prefix(mass[:, :k], keep.top_p)
    counts = kept.sum(-1)

    beside = mass[:, k:].sum(-1) + torch.where(kept, 0.0, mass[:, :k]).sum(-1)
    limit = (selection.vocab_size - mass.shape[1]) * mass[:, -1]
    rest = torch.minimum((1.0 - mass.sum(-1)).clamp(min=0.0), limit)

    steps = steps_below_zero(values[:, :k], keep.logprob_step)
    steps, ordered = order_entries(steps, torch.from_numpy(ids[:, :k]).long(), kept)
    entries = torch.arange(k) < counts[:, None]
    return Selected(
        counts=counts.to(torch.int32).numpy(),
        ids=ordered[entries].to(torch.int32).numpy(),
        logprobs=(steps[entries].to(torch.float32) * -keep.logprob_step).numpy(),
        tail_logmass=(beside + rest).log().to(torch.float32).numpy(),
        label_logprobs=label_logprobs,
        entropy=None,
    )
