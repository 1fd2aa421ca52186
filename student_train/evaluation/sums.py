"""What the figures of an evaluation add up, position by position.

Letters: R positions of a block, V vocabulary, K kept entries. `evaluate.py` defines the figures.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NUM_SUMS = 6
NUM_BINS = 15


class Prediction(NamedTuple):
    """From logits [R, V]: logsumexp [R, 1], the most likely token [R] and its probability [R]."""

    logsumexp: Tensor
    token: Tensor
    probability: Tensor


def predict(logits: Tensor) -> Prediction:
    """The values that all figures of a position need."""
    logsumexp = logits.logsumexp(1, keepdim=True)
    largest, token = logits.max(1)
    return Prediction(logsumexp, token, (largest - logsumexp[:, 0]).exp())


def calibration_bins(prediction: Prediction, labels: Tensor) -> Tensor:
    """Per bin of the largest probability: number, its sum, hits; float64 [3, bins]."""
    probability = prediction.probability.double()
    index = (probability * NUM_BINS).long().clamp_(min=0, max=NUM_BINS - 1)
    values = torch.stack(
        [torch.ones_like(probability), probability, (prediction.token == labels).double()]
    )
    bins = torch.zeros((3, NUM_BINS), dtype=torch.float64, device=labels.device)
    return bins.index_add_(1, index, values)


def position_sums(
    logits: Tensor,
    prediction: Prediction,
    labels: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail_logmass: Tensor | None,
    exact_above: float = -math.inf,
) -> Tensor:
    """Sums over R positions, float64 [6].

    They are: nll, kl_kept, kl_bound, the sum of p * -log q, the number of positions where the
    student agrees with the teacher's most likely token, and of those where that is known.

    logits [R, V] float32, overwritten, and what `predict` says of them; labels [R], ids [R, K]
    int32 or int64, logprobs [R, K] padded with -inf, tail_logmass [R]: None gives a kl_bound of 0.
    `exact_above` is that of `Keep`. A position without entries adds only to the first sum.
    """
    kept = logprobs > float("-inf")
    with_entries = kept.any(1)
    logsumexp = prediction.logsumexp
    nll = logsumexp - logits.gather(1, labels[:, None])
    student = logits.gather(1, ids) - logsumexp
    agreed = known = with_entries
    if ids.shape[1]:  # entries are largest first
        known = logprobs[:, 0] > exact_above
        leading = kept & (logprobs == logprobs[:, :1])
        agreed = known & (leading & (ids == prediction.token[:, None])).any(1)
    teacher = logprobs.double()
    weighted = torch.where(kept, teacher.exp() * -student.double(), 0.0).sum(1)
    kl_kept = _kl(teacher, student)
    kl_bound = torch.zeros_like(kl_kept)
    if tail_logmass is not None:
        # The student's mass outside the kept entries, summed up there and not as 1 - the rest,
        # which would have no digits left where a student is confident.
        logits.scatter_add_(1, ids, torch.where(kept, float("-inf"), 0.0))
        rest = logits.logsumexp(1, keepdim=True) - logsumexp
        kl_bound = _kl(
            torch.cat([teacher, tail_logmass[:, None].double()], 1), torch.cat([student, rest], 1)
        )
    parts = (nll.double(), kl_kept, kl_bound * with_entries, weighted, agreed, known)
    return torch.stack([part.sum(dtype=torch.float64) for part in parts])


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(w || q) [R] of log-probabilities [R, N], w = teacher renormalised; -inf adds nothing.

    Rounded teacher values do not add up to 1; renormalised, no KL falls below zero.
    """
    logs = torch.log_softmax(teacher, 1)
    terms = logs.exp() * (logs - student.double())
    return torch.where(teacher > float("-inf"), terms, 0.0).sum(1)
