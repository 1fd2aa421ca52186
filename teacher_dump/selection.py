"""A block of logits -> what is kept of each position, on whatever device the logits are on.

Letters: T positions of the block, V vocabulary, K the most entries a position can keep.

One pass makes everything a row of the shard needs: the kept ids and log-probabilities, the mass
that was not kept, the label's log-probability and the entropy. The result is ONE int32 tensor
[T, 4 + 2 K] (float columns hold the bits of a float32), so that a request costs one copy to the
host and no Python object per token.

Top-k narrows down by groups: the k largest values lie in the k groups with the largest maxima, so
64 columns become one, then 8 candidates one. The groups also give the tail: the mass of all groups
without a candidate plus what is left of the candidates, sums of the unkept entries themselves.
`1 - kept mass` would lose a tail of 1e-7, an ordinary one after a token the teacher is sure of.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from shards.rows import Float32Array, Int32Array

HEADER_WORDS = 4  # count, tail_logmass, label logprob, entropy
GROUP = 64
SUBGROUP = 8
_IMPOSSIBLE = (
    -1e4
)  # padding of the last group: its probability is 0, and 0 * -1e4 too, unlike 0 * -inf


@dataclass(frozen=True, kw_only=True)
class TopPK:
    """Keep the smallest prefix whose mass reaches `top_p`, then at most `top_k` of it.

    `logprob_step` is the grid, in nats, that kept log-probabilities are rounded to; `vocab_size`
    the tokenizer's length: columns beyond it are padding of the model and do not exist here.
    """

    top_p: float
    top_k: int
    logprob_step: float
    vocab_size: int

    @property
    def width(self) -> int:
        """int32 words per position in the packed result."""
        return HEADER_WORDS + 2 * self.top_k


@dataclass(frozen=True, kw_only=True)
class Selected:
    """Unpacked positions: counts [T], ids and logprobs [E] flat, tail_logmass [T], nats, unrounded.

    `logprobs` are rounded to the grid already (their order depends on it); the rest is exact, so
    that sums over a row are.
    """

    counts: Int32Array
    ids: Int32Array
    logprobs: Float32Array
    tail_logmass: Float32Array
    label_logprobs: Float32Array
    entropy: Float32Array


class TopPKSelector:
    """Selects block after block; holds the work buffers, so that a block allocates nothing large.

    On a CPU a fresh buffer of the size of the logits costs page faults as dear as the arithmetic.
    """

    def __init__(self, keep: TopPK) -> None:
        self.keep = keep
        self._buffers: dict[str, torch.Tensor] = {}

    def _buffer(self, name: str, num_rows: int, device: torch.device) -> torch.Tensor:
        """[num_rows, V rounded up to whole groups] float32, contents of earlier blocks."""
        padded = -(-self.keep.vocab_size // GROUP) * GROUP
        have = self._buffers.get(name)
        if have is None or have.shape[0] < num_rows or have.device != device:
            have = torch.empty((num_rows, padded), dtype=torch.float32, device=device)
            self._buffers[name] = have
        return have[:num_rows]

    def _whole_groups(self, logits: torch.Tensor) -> torch.Tensor:
        """[T, >= V] -> [T, V rounded up] float32; a view where the logits are that already."""
        vocab = self.keep.vocab_size
        if logits.dtype == torch.float32 and logits.shape[1] == vocab and vocab % GROUP == 0:
            return logits.contiguous()
        padded = self._buffer("logits", logits.shape[0], logits.device)
        padded[:, :vocab] = logits[:, :vocab]
        padded[:, vocab:] = _IMPOSSIBLE
        return padded

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """logits [T, >= V], labels [T] int64 -> packed [T, 4 + 2 K] int32, see `unpack`.

        Entries stand largest first, equal (rounded) values by ascending id. The logits are left
        as they are.
        """
        keep, num_rows = self.keep, logits.shape[0]
        logits = self._whole_groups(logits)
        probs = self._buffer("probs", num_rows, logits.device)
        torch.softmax(logits, -1, out=probs)

        k = min(keep.top_k, keep.vocab_size)
        best, candidates = _best_groups(logits, k)
        values, where = _top_of_candidates(candidates, k)
        ids = best.gather(1, where // GROUP) * GROUP + where % GROUP
        mass = probs.gather(1, ids)
        log_total = values[:, :1] - mass[:, :1].log()
        kept = (mass.cumsum(-1) - mass) < keep.top_p  # the prefix before it is still too light
        kept[:, 0] = True

        group_mass = probs.view(num_rows, -1, GROUP).sum(-1)
        left = _take_groups(probs, best).scatter_(1, where, torch.where(kept, 0.0, mass)).sum(-1)
        tail = left + group_mass.scatter_(1, best, 0.0).sum(-1)

        packed = torch.zeros((num_rows, keep.width), dtype=torch.int32, device=logits.device)
        packed[:, 0] = kept.sum(-1)
        floats = packed.view(torch.float32)
        floats[:, 1] = tail.log()
        floats[:, 2] = logits.gather(1, labels[:, None])[:, 0] - log_total[:, 0]
        floats[:, 3] = log_total[:, 0] - probs.mul_(logits).sum(-1)
        _write_entries(packed, ids, values - log_total, kept, keep)
        return packed


def _take_groups(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[T, V], group numbers [T, N] -> [T, N * GROUP]; whole rows, unlike `gather`."""
    num_rows = values.shape[0]
    num_groups = values.shape[1] // GROUP
    first = torch.arange(num_rows, device=values.device)[:, None] * num_groups
    rows = values.view(-1, GROUP).index_select(0, (first + groups).view(-1))
    return rows.view(num_rows, -1)


def _best_groups(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, V] -> the groups [T, N] holding the k largest values, their values [T, N * GROUP]."""
    maxima = logits.view(logits.shape[0], -1, GROUP).amax(-1)
    best = torch.topk(maxima, min(k, maxima.shape[1]), dim=-1, sorted=False)[1]
    return best, _take_groups(logits, best)


def _top_of_candidates(candidates: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, C] -> the k largest values [T, k], largest first, and their places in C [T, k]."""
    num_rows, num_candidates = candidates.shape
    stride = num_candidates // SUBGROUP
    maxima = candidates.view(num_rows, SUBGROUP, stride).amax(1)
    best = torch.topk(maxima, min(k, stride), dim=-1, sorted=False)[1]
    members = torch.arange(SUBGROUP, device=candidates.device) * stride
    places = (best[:, :, None] + members).view(num_rows, -1)
    values, order = torch.topk(candidates.gather(1, places), k, dim=-1)
    return values, places.gather(1, order)


def _write_entries(
    packed: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, kept: torch.Tensor, keep: TopPK
) -> None:
    """Round, order by (value, id) with what is not kept last, and store both columns."""
    k = ids.shape[1]
    steps = (logprobs * (-1.0 / keep.logprob_step)).round_().clamp_(max=2.0**30).to(torch.int64)
    steps = torch.where(kept, steps.clamp_(min=0), 2**31)
    order = ((steps << 31) | ids).sort(dim=-1)[0]
    packed[:, HEADER_WORDS : HEADER_WORDS + k] = order & 0x7FFFFFFF
    rounded = (order >> 31).to(torch.float32) * -keep.logprob_step
    start = HEADER_WORDS + keep.top_k
    packed.view(torch.float32)[:, start : start + k] = rounded


def unpack(packed: Int32Array, keep: TopPK) -> Selected:
    """packed [T, 4 + 2 K] int32 on the host -> flat arrays; ValueError if it is torn."""
    if packed.ndim != 2 or packed.shape[1] != keep.width:
        raise ValueError(f"packed result of shape {packed.shape}, expected [T, {keep.width}]")
    counts = np.ascontiguousarray(packed[:, 0])
    if packed.shape[0] and (counts.min() < 1 or counts.max() > keep.top_k):
        raise ValueError(f"counts of {counts.min()} to {counts.max()}, expected 1 to {keep.top_k}")
    floats = packed.view(np.float32)
    mask = np.arange(keep.top_k, dtype=np.int32) < counts[:, None]
    k = keep.top_k
    return Selected(
        counts=counts,
        ids=packed[:, HEADER_WORDS : HEADER_WORDS + k][mask],
        logprobs=floats[:, HEADER_WORDS + k :][mask],
        tail_logmass=np.ascontiguousarray(floats[:, 1]),
        label_logprobs=np.ascontiguousarray(floats[:, 2]),
        entropy=np.ascontiguousarray(floats[:, 3]),
    )


def round_to_step(values: Float32Array, step: float) -> Float32Array:
    """Round to the nearest multiple of `step` nats; -inf, an empty tail, stays what it is."""
    rounded: Float32Array = (np.rint(values / np.float32(step)) * np.float32(step)).astype(
        np.float32
    )
    return rounded
