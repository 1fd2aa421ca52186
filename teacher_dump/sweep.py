"""What a softmax over the vocabulary needs of a block of logits, found while they are in the cache.

Letters: T positions, V vocabulary in whole groups, N groups, M interleaved sets (`groups.py`).

On a CPU the passes over a row cost what its memory costs, so that all of them are done on a few
rows before the next ones are touched. Exponentials stay unnormalised; a division of the few that
are looked at is cheaper.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from teacher_dump.groups import GROUP, MEMBERS, Workspace

# Logits of the rows that are swept together, of each thread on a CPU; in use is three times that.
CPU_THREAD_BYTES = 800 << 10
GPU_BYTES = 64 << 20  # not measured

# torch.exp is MKL's, which takes 29 us for a row of 49,152 on 2 cores of an AMD EPYC; torch.exp2 is
# PyTorch's own and takes 8. The product is rounded: a probability of exp(-30) is off by 3e-6 of it.
_LOG2_E = math.log2(math.e)


class Sweep(NamedTuple):
    """exps [T, V] are exp(logit - the row's largest), in a buffer of the workspace.

    maxima [T, M] are the sets' largest logits, group_mass [T, N] the sums of the groups' exps and
    total [T, 1] float64 of all. log_total [T] is log sum exp of the logits and entropy [T] that of
    the softmax, both float64, nats.
    """

    exps: torch.Tensor
    maxima: torch.Tensor
    group_mass: torch.Tensor
    total: torch.Tensor
    log_total: torch.Tensor
    entropy: torch.Tensor


def sweep(logits: torch.Tensor, workspace: Workspace) -> Sweep:
    """logits [T, V] float32 of whole groups, which are left as they are."""
    num_rows, vocab = logits.shape
    device = logits.device
    exps = workspace.buffer("exps", num_rows, device)
    maxima = torch.empty((num_rows, vocab // MEMBERS), device=device)
    group_mass = torch.empty((num_rows, vocab // GROUP), device=device)
    weighted = torch.empty(num_rows, device=device)  # sums of exp times (logit - the largest)
    rows = _rows_of_part(logits)
    below = workspace.buffer("below", min(rows, num_rows), device)
    for start in range(0, num_rows, rows):
        part = slice(start, start + rows)
        piece, out = logits[part], exps[part]
        shifted = below[: len(piece)]
        torch.amax(piece.view(len(piece), MEMBERS, -1), 1, out=maxima[part])
        torch.sub(piece, maxima[part].amax(-1, keepdim=True), out=shifted)
        torch.exp2(torch.mul(shifted, _LOG2_E, out=out), out=out)
        torch.sum(out.view(len(piece), -1, GROUP), -1, out=group_mass[part])
        torch.sum(shifted.mul_(out), -1, out=weighted[part])
    total = group_mass.sum(-1, keepdim=True, dtype=torch.float64)
    log_sum = total[:, 0].log()
    return Sweep(
        exps=exps,
        maxima=maxima,
        group_mass=group_mass,
        total=total,
        log_total=maxima.amax(-1) + log_sum,
        entropy=log_sum - weighted / total[:, 0],
    )


def _rows_of_part(logits: torch.Tensor) -> int:
    row_bytes = logits.shape[1] * logits.element_size()
    if logits.device.type == "cpu":
        threads = torch.get_num_threads()
        return threads * max(1, CPU_THREAD_BYTES // row_bytes)
    return max(1, GPU_BYTES // row_bytes)
