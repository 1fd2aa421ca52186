"""Draws and threshold sampling of a block of logits, on whatever device the logits are on.

Letters: T positions of the block, V vocabulary, K the most entries a position can keep.

Both lay entries out along a line, each as long as its mass, and look up which of them some points
hit. Draws are n uniform points on all entries. Threshold takes out those of p >= t, which are kept
for certain, and lays points one t apart, from one uniform start, on the others: each is hit with
probability p / t, and never twice.

Lookup is by groups of 64, so that only the groups that are hit are summed up entry by entry.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from teacher_dump.groups import GROUP, IMPOSSIBLE, Workspace, largest, take_groups
from teacher_dump.keep import Draws, Threshold
from teacher_dump.packing import (
    empty_packed,
    order_entries,
    steps_below_zero,
    write_entries,
    write_header,
)
from teacher_dump.random_keys import uniforms


class SamplingSelector:
    """Selects block after block; holds the work buffers."""

    def __init__(self, keep: Draws | Threshold) -> None:
        self.keep = keep
        self._workspace = Workspace(keep.vocab_size)

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """See `Selector.__call__`. The label's log-probability and entropy are at temperature 1."""
        keep, num_rows = self.keep, logits.shape[0]
        logits = self._workspace.whole_groups(logits)
        probs = torch.softmax(logits, -1, out=self._buffer("probs", logits))
        tempered = probs if keep.temperature == 1 else self._tempered(logits)
        if isinstance(keep, Threshold):
            found = _threshold(tempered, keys, keep)
        else:
            found = _draws(tempered, keys, keep)

        likely = found.likely if tempered is probs else _Line(probs).likely()
        log_total = logits.gather(1, likely) - probs.gather(1, likely).log()
        label_logprobs = logits.gather(1, labels[:, None]) - log_total
        entropy = log_total[:, 0] - probs.mul_(logits).sum(-1)

        packed = empty_packed(num_rows, keep, logits.device)
        write_header(packed, found.counts, label_logprobs[:, 0], entropy)
        write_entries(packed, found.ids, found.logprobs)
        return packed

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return self._workspace.buffer(name, like.shape[0], like.device)

    def _tempered(self, logits: torch.Tensor) -> torch.Tensor:
        """The probabilities [T, V] at the temperature of the method."""
        tempered = torch.div(logits, self.keep.temperature, out=self._buffer("tempered", logits))
        tempered[:, self.keep.vocab_size :] = IMPOSSIBLE
        return torch.softmax(tempered, -1, out=tempered)


class _Found(NamedTuple):
    """counts [T], ids and logprobs [T, <= K]; likely [T, 1], one id of considerable probability."""

    counts: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor
    likely: torch.Tensor


def _threshold(probs: torch.Tensor, keys: torch.Tensor, keep: Threshold) -> _Found:
    """Probabilities [T, V] at the method's temperature, which are left as they were."""
    threshold = float(np.float32(keep.threshold))
    num_certain = min(int(1.0001 / threshold), keep.vocab_size)
    mass, large = largest(probs, num_certain)
    certain = mass >= threshold

    probs.scatter_(1, large, torch.where(certain, 0.0, mass))
    grid = torch.arange(keep.max_entries, device=probs.device)
    points = (uniforms(keys, 1) + grid) * threshold
    line = _Line(probs)
    small = line.entries_at(points)
    hit = points < line.total
    hit[:, 1:] &= small[:, 1:] != small[:, :-1]  # but for rounding, p < t is hit once at most
    probs.scatter_(1, large, mass)

    steps = torch.cat(
        [
            steps_below_zero(mass.log(), keep.logprob_step),
            torch.full_like(small, keep.threshold_steps),
        ],
        dim=-1,
    )
    kept = torch.cat([certain, hit], dim=-1)
    steps, ids = order_entries(steps, torch.cat([large, small], dim=-1), kept)
    steps, ids = steps[:, : keep.max_entries], ids[:, : keep.max_entries]
    logprobs = steps.to(torch.float32) * -keep.logprob_step
    return _Found(kept.sum(-1), ids, logprobs, large[:, :1])


def _draws(probs: torch.Tensor, keys: torch.Tensor, keep: Draws) -> _Found:
    """Probabilities [T, V] at the method's temperature."""
    num = keep.draws
    line = _Line(probs)
    # The total is 1 but for rounding: a point beyond it would hit anything.
    points = uniforms(keys, num).sort(dim=-1)[0] * line.total
    # ids come in ascending order, so that draws of one entry stand side by side: a run
    drawn = line.entries_at(points)
    starts = torch.ones_like(drawn, dtype=torch.bool)
    torch.ne(drawn[:, 1:], drawn[:, :-1], out=starts[:, 1:])
    run = starts.cumsum(-1) - 1
    times = torch.zeros_like(drawn).scatter_add_(1, run, torch.ones_like(drawn))
    ids = torch.zeros_like(drawn).scatter_(1, run, drawn)
    missed, ids = order_entries(num - times, ids, times > 0)
    missed, ids = missed[:, : keep.max_entries], ids[:, : keep.max_entries]
    logprobs = ((num - missed).clamp(min=1) / num).log()
    return _Found(starts.sum(-1), ids, logprobs, line.likely())


class _Line:
    """Entries of masses [T, V] laid end to end, each as long as its mass.

    total [T, 1] float64 is where the line ends.
    """

    def __init__(self, mass: torch.Tensor) -> None:
        self._mass = mass
        groups = mass.view(mass.shape[0], -1, GROUP)
        self._group_mass = groups.sum(-1).to(torch.float64)
        self._ends = self._group_mass.cumsum(-1)
        self.total = self._ends[:, -1:]

    def entries_at(self, points: torch.Tensor) -> torch.Tensor:
        """points [T, N] float64, in any order -> ids [T, N], without meaning from the total on."""
        num_rows, num_points = points.shape
        ends = self._ends
        groups = torch.searchsorted(ends, points, right=True).clamp_(max=ends.shape[1] - 1)
        of_group = self._group_mass.gather(1, groups)
        share = (points - ends.gather(1, groups)) / of_group + 1
        members = take_groups(self._mass, groups).view(num_rows, num_points, GROUP)
        inner_ends = members.cumsum(-1, dtype=torch.float64)
        # Below the last end, whatever rounding says: behind it lie entries of mass 0.
        inside = inner_ends[:, :, -1:] * share.clamp_(min=0, max=1 - 1e-12)[:, :, None]
        offsets = torch.searchsorted(inner_ends, inside, right=True)[:, :, 0]
        return groups * GROUP + offsets.clamp_(max=GROUP - 1)

    def likely(self) -> torch.Tensor:
        """ids [T, 1], each of at least 1 / V of the total."""
        best = self._group_mass.argmax(-1, keepdim=True)
        return best * GROUP + take_groups(self._mass, best).argmax(-1, keepdim=True)
