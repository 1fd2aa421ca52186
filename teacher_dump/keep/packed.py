"""The packed result of a block of positions: one int32 tensor, so that a request costs one copy.

Letters: T positions, K the most entries of a position, E entries of all positions.

    word 0          count of entries
    words 1 to 3    tail_logmass (0 where a method has none), label log-probability, entropy
    K words         ids, then as many words of log-probabilities

Floats are the bits of a float32. Entries are in descending order, equal (stored) values by
ascending id. Words after the last entry have no meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from shards.rows import Float32Array, Int32Array
from teacher_dump.keep.packed_size import HEADER_WORDS, Selection

_LAST = 2**31  # a rank behind every entry's


@dataclass(frozen=True, kw_only=True)
class Selected:
    """Unpacked positions: counts [T], ids and logprobs [E] flat, the others [T], nats.

    `logprobs` are rounded as stored (which decides their order). The other values are exact, so
    that sums over a row are exact. `tail_logmass` is None for sampling methods, `entropy` for an
    engine that does not see the whole distribution.
    """

    counts: Int32Array
    ids: Int32Array
    logprobs: Float32Array
    tail_logmass: Float32Array | None
    label_logprobs: Float32Array
    entropy: Float32Array | None


def empty_packed(num_rows: int, selection: Selection, device: torch.device) -> torch.Tensor:
    """packed [T, 4 + 2 K] int32 without any entry."""
    return torch.zeros((num_rows, selection.width), dtype=torch.int32, device=device)


def write_header(
    packed: torch.Tensor,
    counts: torch.Tensor,
    label_logprobs: torch.Tensor,
    entropy: torch.Tensor,
    tail_logmass: torch.Tensor | None = None,
) -> None:
    """Store what there is once per position, all [T]."""
    packed[:, 0] = counts
    floats = packed.view(torch.float32)
    if tail_logmass is not None:
        floats[:, 1] = tail_logmass
    floats[:, 2] = label_logprobs
    floats[:, 3] = entropy


def order_entries(
    ranks: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """ranks, ids [T, N] int64, kept [T, N] -> both ordered by (rank, id), what is not kept last.

    Ranks are from 0 to 2^30, the largest entry's the smallest.
    """
    order = ((torch.where(kept, ranks, _LAST) << 31) | ids).sort(dim=-1)[0]
    return order >> 31, order & 0x7FFFFFFF


def write_entries(packed: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> None:
    """Store ordered entries [T, N <= K]."""
    max_entries = (packed.shape[1] - HEADER_WORDS) // 2
    num = ids.shape[1]
    packed[:, HEADER_WORDS : HEADER_WORDS + num] = ids
    start = HEADER_WORDS + max_entries
    packed.view(torch.float32)[:, start : start + num] = logprobs


def steps_below_zero(logprobs: torch.Tensor, step: float) -> torch.Tensor:
    """Log-probabilities on the grid, as int64 numbers of steps below 0."""
    steps = (logprobs * (-1.0 / step)).round_().clamp_(min=0, max=2.0**30)
    return steps.to(torch.int64)


def unpack(packed: Int32Array, selection: Selection) -> Selected:
    """packed [T, 4 + 2 K] int32 on the host -> flat arrays; ValueError if it is torn."""
    if packed.ndim != 2 or packed.shape[1] != selection.width:
        raise ValueError(f"packed result of shape {packed.shape}, expected [T, {selection.width}]")
    counts = np.ascontiguousarray(packed[:, 0])
    k = selection.max_entries
    if packed.shape[0] and (counts.min() < 1 or counts.max() > k):
        raise ValueError(f"counts of {counts.min()} to {counts.max()}, expected 1 to {k}")
    floats = packed.view(np.float32)
    mask = np.arange(k, dtype=np.int32) < counts[:, None]
    return Selected(
        counts=counts,
        ids=packed[:, HEADER_WORDS : HEADER_WORDS + k][mask],
        logprobs=floats[:, HEADER_WORDS + k :][mask],
        tail_logmass=np.ascontiguousarray(floats[:, 1]) if selection.keep.has_tail else None,
        label_logprobs=np.ascontiguousarray(floats[:, 2]),
        entropy=np.ascontiguousarray(floats[:, 3]),
    )


def round_to_step(values: Float32Array, step: float) -> Float32Array:
    """Round to the nearest multiple of `step` nats; -inf, an empty tail, stays what it is."""
    rounded: Float32Array = (np.rint(values / np.float32(step)) * np.float32(step)).astype(
        np.float32
    )
    return rounded
