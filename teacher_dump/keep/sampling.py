"""Draws and threshold sampling of a block of logits, on whatever device the logits are on.

Letters: T positions of the block, V vocabulary, K the most entries a position can keep.

Both put the entries end to end on a line, each as long as its mass, and look up which entries some
points hit. `draws` uses n uniform points on all entries. `threshold` keeps entries with p >= t for
certain and takes them out. On the others it uses points at a distance of t from one uniform start,
which hit each entry with probability p / t, and never twice.

Lookup goes by groups of 64, so that only the groups that were hit are summed entry by entry.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from shards.keep import Draws, Threshold
from teacher_dump.keep.groups import GROUP, IMPOSSIBLE, Workspace
from teacher_dump.keep.packed import (
    empty_packed,
    order_entries,
    steps_below_zero,
    write_entries,
    write_header,
)
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.random_keys import uniforms
from teacher_dump.keep.sweep import Sweep, Sweeper, places_of_top


class SamplingSelector:
    """Selects block after block; holds the work buffers."""

    def __init__(self, keep: Draws | Threshold, vocab_size: int) -> None:
        self.selection = Selection(keep, vocab_size)
        self._keep = keep
        self._workspace = Workspace(vocab_size)
        self._sweep = Sweeper()

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """See `Selector.__call__`. The label's log-probability and entropy are at temperature 1."""
        keep, num_rows = self._keep, logits.shape[0]
        logits = self._workspace.whole_groups(logits)
        whole = tempered = self._sweep(logits)
        label_logprobs = whole.at(labels[:, None])[:, 0] - whole.log_total
        if keep.temperature != 1:
            tempered = self._sweep(self._tempered(logits))
        if isinstance(keep, Threshold):
            entries = _threshold(tempered, keys, keep, self.selection)
        else:
            entries = _draws(tempered, keys, keep, self.selection)

        packed = empty_packed(num_rows, self.selection, logits.device)
        write_header(packed, entries.counts, label_logprobs, whole.entropy)
        write_entries(packed, entries.ids, entries.logprobs)
        return packed

    def _tempered(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] over the temperature of the method, in a buffer."""
        buffer = self._workspace.buffer("tempered", logits.shape[0], logits.device)
        torch.div(logits, self._keep.temperature, out=buffer)
        buffer[:, self.selection.vocab_size :] = IMPOSSIBLE
        return buffer


class _Entries(NamedTuple):
    """counts [T], ids and logprobs [T, <= K]."""

    counts: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor


def _threshold(swept: Sweep, keys: torch.Tensor, keep: Threshold, selection: Selection) -> _Entries:
    """The sweep of logits [T, V] at the method's temperature."""
    threshold = keep.threshold
    num_certain = min(int(1.0001 / threshold), selection.vocab_size)
    _, columns = swept.leading_sets(num_certain)
    candidates = swept.at(columns)
    places = places_of_top(candidates, num_certain, in_order=False)
    values, large = candidates.gather(1, places), columns.gather(1, places)
    logprobs = values - swept.log_total[:, None]
    # Certain is what reaches this logit: of the same logit, every comparison says the same.
    least = (swept.log_total + keep.log_threshold).to(values.dtype)[:, None]
    certain = values >= least

    line = _Line(swept, below=least, groups=large // GROUP)
    grid = torch.arange(selection.max_entries, device=values.device)
    points = (uniforms(keys, 1) + grid) * threshold * swept.total
    small = line.entries_at(points)
    hit = points < line.total
    hit[:, 1:] &= small[:, 1:] != small[:, :-1]  # but for rounding, p < t is hit once at most

    steps = torch.cat(
        [
            steps_below_zero(logprobs, keep.logprob_step),
            torch.full_like(small, keep.threshold_steps),
        ],
        dim=-1,
    )
    kept = torch.cat([certain, hit], dim=-1)
    steps, ids = order_entries(steps, torch.cat([large, small], dim=-1), kept)
    steps, ids = steps[:, : selection.max_entries], ids[:, : selection.max_entries]
    return _Entries(kept.sum(-1), ids, steps.to(torch.float32) * -keep.logprob_step)


def _draws(swept: Sweep, keys: torch.Tensor, keep: Draws, selection: Selection) -> _Entries:
    """The sweep of logits [T, V] at the method's temperature."""
    num = keep.draws
    line = _Line(swept)
    points = uniforms(keys, num).sort(dim=-1)[0] * line.total
    # ids come in ascending order, so that draws of one entry stand side by side: a run
    drawn = line.entries_at(points)
    starts = torch.ones_like(drawn, dtype=torch.bool)
    torch.ne(drawn[:, 1:], drawn[:, :-1], out=starts[:, 1:])
    run = starts.cumsum(-1) - 1
    times = torch.zeros_like(drawn).scatter_add_(1, run, torch.ones_like(drawn))
    ids = torch.zeros_like(drawn).scatter_(1, run, drawn)
    missed, ids = order_entries(num - times, ids, times > 0)
    missed, ids = missed[:, : selection.max_entries], ids[:, : selection.max_entries]
    return _Entries(starts.sum(-1), ids, ((num - missed).clamp(min=1) / num).log())


class _Line:
    """Entries of a sweep laid end to end, each as long as its mass.

    With `below` [T, 1] those whose logit is not below it are left out; they must be in `groups`
    [T, any]. total [T, 1] float64 is where the line ends.
    """

    def __init__(
        self, swept: Sweep, below: torch.Tensor | None = None, groups: torch.Tensor | None = None
    ) -> None:
        self._swept = swept
        self._below = below
        self._group_mass = swept.part_mass
        if groups is not None:
            self._group_mass = swept.part_mass.scatter(1, groups, self._mass(groups).sum(-1))
        self._ends = self._group_mass.cumsum(-1, dtype=torch.float64)
        self.total = self._ends[:, -1:]

    def entries_at(self, points: torch.Tensor) -> torch.Tensor:
        """points [T, N] float64, in any order -> ids [T, N], without meaning from the total on."""
        ends = self._ends
        groups = torch.searchsorted(ends, points, right=True).clamp_(max=ends.shape[1] - 1)
        of_group = self._group_mass.gather(1, groups)
        share = (points - ends.gather(1, groups)) / of_group + 1
        inner_ends = self._mass(groups).cumsum(-1, dtype=torch.float64)
        # Below the last end, whatever rounding says: behind it lie entries of mass 0.
        inside = inner_ends[:, :, -1:] * share.clamp_(min=0, max=1 - 1e-12)[:, :, None]
        offsets = torch.searchsorted(inner_ends, inside, right=True)[:, :, 0]
        return groups * GROUP + offsets.clamp_(max=GROUP - 1)

    def _mass(self, groups: torch.Tensor) -> torch.Tensor:
        """The lengths [T, N, 64] of the members of these groups [T, N]."""
        logits = self._swept.in_groups(groups)
        mass = self._swept.mass(logits)
        return mass if self._below is None else mass.where(logits < self._below[:, :, None], 0.0)
