"""Everything that a softmax over the vocabulary needs, in one pass over a block of logits.

Letters: T positions, V vocabulary in whole groups, N groups, M interleaved sets (`groups.py`).

A mass is exp(logit - the row's largest logit), unnormalised: dividing the few that are needed is
cheaper. Masses are not stored, because writing all of them costs as much as computing them. The few
that are needed are computed again from the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from teacher_dump.keep.compiling import WORTH_COMPILING, CompiledLater, Function
from teacher_dump.keep.groups import GROUP, MEMBERS, members

# Logits of the rows that are swept together where the pass is not compiled, of each thread on a
# CPU. Several operations then pass over them, which cost what a CPU's cache costs.
CPU_THREAD_BYTES = 800 << 10
GPU_BYTES = 64 << 20  # not measured

# torch.exp is MKL's, which takes 29 us for a row of 49,152 on 2 cores of an AMD EPYC; torch.exp2 is
# PyTorch's own and takes 8. The product is rounded: a probability of exp(-30) is off by 3e-6 of it.
_LOG2_E = math.log2(math.e)


class Sweep(NamedTuple):
    """The pass over logits [T, V]: maxima [T, M] of the sets, largest [T, 1] of the row.

    part_mass are the masses of the sets [T, M] or of the groups [T, N], and total [T, 1] float64 of
    all. log_total [T] is log sum exp of the logits and entropy [T] that of the softmax, both
    float64, nats.
    """

    logits: torch.Tensor
    maxima: torch.Tensor
    largest: torch.Tensor
    part_mass: torch.Tensor
    total: torch.Tensor
    log_total: torch.Tensor
    entropy: torch.Tensor

    def at(self, columns: torch.Tensor) -> torch.Tensor:
        """The logits in some columns [T, any]."""
        return self.logits.gather(1, columns)

    def in_groups(self, groups: torch.Tensor) -> torch.Tensor:
        """The logits of the groups with these numbers [T, any]: [T, any, 64]."""
        num_rows, vocab = self.logits.shape
        first = torch.arange(num_rows, device=groups.device)[:, None] * (vocab // GROUP)
        all_groups = self.logits.view(-1, GROUP)
        rows = all_groups.index_select(0, (first + groups).view(-1))  # whole rows, unlike `gather`
        return rows.view(*groups.shape, GROUP)

    def mass(self, logits: torch.Tensor) -> torch.Tensor:
        """What logits of these rows weigh, [T, any] or [T, any, any]."""
        largest = self.largest if logits.dim() == 2 else self.largest[:, :, None]
        return torch.exp2(_below(logits, largest))

    def leading_sets(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sets [T, <= k] that the k largest logits lie in, and their columns [T, 8 times that].

        They are the sets with the largest maxima, found the same way in sets of sets.
        """
        num_sets = self.maxima.shape[1]
        num_large = num_sets // MEMBERS
        of_large = self.maxima.view(-1, MEMBERS, num_large).amax(1)
        large = places_of_top(of_large, min(k, num_large), in_order=False)
        sets = members(large, num_large)
        maxima = self.maxima.gather(1, sets)
        best = places_of_top(maxima, min(k, maxima.shape[1]), in_order=False)
        best_sets = sets.gather(1, best)
        return best_sets, members(best_sets, num_sets)


class Sweeper:
    """Sweeps block after block of one vocabulary; `by_sets` says what `part_mass` is of."""

    def __init__(self, *, by_sets: bool = False) -> None:
        function = _pass_by_sets if by_sets else _pass_by_groups
        # A row of 49,152 takes 23 and 21 us on 2 cores of an AMD EPYC, and 45 in parts.
        self._pass = CompiledLater(function, _in_parts(function), WORTH_COMPILING)

    def __call__(self, logits: torch.Tensor) -> Sweep:
        """logits [T, V] float32 of whole groups, contiguous, which are left as they are."""
        maxima, largest, part_mass, total, weighted = self._pass(logits)
        log_sum = total.log()
        return Sweep(
            logits=logits,
            maxima=maxima,
            largest=largest,
            part_mass=part_mass,
            total=total[:, None],
            log_total=largest[:, 0] + log_sum,
            entropy=log_sum - weighted / total * math.log(2),
        )


def places_of_top(values: torch.Tensor, k: int, *, in_order: bool = True) -> torch.Tensor:
    """Where the k largest of every row of values [T, any] float32 are: [T, k], largest first.

    Integers in the order of the floats take torch.topk three quarters of the time on a CPU.
    """
    assert values.dtype == torch.float32
    bits = values.view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return torch.topk(keys, k, dim=-1, sorted=in_order)[1]


def _pass_by_groups(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """maxima, largest, part_mass, total [T] and weighted [T], both float64.

    The last is the sum of mass times (logit - the largest) in units of log 2.
    """
    return _pass(logits, lambda values: torch.unflatten(values, -1, (-1, GROUP)).sum(-1))


def _pass_by_sets(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _pass(logits, lambda values: torch.unflatten(values, 1, (MEMBERS, -1)).sum(1))


def _pass(
    logits: torch.Tensor, by_parts: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    maxima = torch.unflatten(logits, 1, (MEMBERS, -1)).amax(1)
    largest = maxima.amax(-1, keepdim=True)
    below = _below(logits, largest)
    mass = torch.exp2(below)
    part_mass, weighted = by_parts(mass), by_parts(mass * below)
    total = part_mass.sum(-1, dtype=torch.float64)
    return maxima, largest, part_mass, total, weighted.sum(-1, dtype=torch.float64)


def _below(logits: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return (logits - largest) * _LOG2_E


def _in_parts(function: Function) -> Function:
    """The function over a few rows at a time."""

    def in_parts(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = map(function, torch.split(logits, _rows_of_part(logits)))
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    return in_parts


def _rows_of_part(logits: torch.Tensor) -> int:
    row_bytes = logits.shape[1] * logits.element_size()
    if logits.device.type == "cpu":
        threads = torch.get_num_threads()
        return threads * max(1, CPU_THREAD_BYTES // row_bytes)
    return max(1, GPU_BYTES // row_bytes)
