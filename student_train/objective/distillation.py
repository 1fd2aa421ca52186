"""The distillation part of the loss on a block of rows: its value, and its gradient in place.

Letters: T tokens, V vocabulary, K kept entries, R rows of a block. z are the student's logits, q
their softmax, p the teacher's kept probabilities as they are stored, P the mass that was not kept.

    NLL = sum_k w_k * -log q_k                            KLD = NLL - H(w)
    w   = softmax over the kept entries of logprob / temperature             ("renormalize")

is the F(z) = softmax(Truncate(z) / tau) of pre-training distillation (Peng et al., arXiv
2410.16215). The student's side is its full softmax at temperature 1, so probability outside the
kept entries costs something; only the teacher is tempered, so there is no tau^2. A student that
equals the teacher does not reach the least value: that belongs to one that puts nothing outside.
The temperature, and a weight of NLL and KLD, may differ by position: see `temperatures`.

    tau_s^2 * NLL or KLD with q = softmax(z / tau_s)                         ("student temperature")

tempers the student as well. The factor, in value and gradient, makes up for gradients that are
smaller by about as much (Hinton et al. 2015, arXiv 1503.02531, section 2; their teacher has the
same temperature). Sampled weights are used there as they are.

    NLL = sum_k w_k * -log q_k + W * -log Q,   Q = 1 - sum_k q_k             ("bucket")

takes all that was not kept as one more class on both sides: w and W are p and P divided by their
sum, which rounding moves from 1. The student that equals the teacher has a KLD of 0 up to rounding.

    MSE = mean_k (z_k - mean(z) - (logp_k - mean(logp)) / temperature)^2,   means over kept entries

compares logits without the constant that a softmax does not see. It is blind outside the kept
entries: whatever the student puts there costs nothing.

Sampled weights are right in expectation only. They do not sum to 1 at a position, and dividing them
by their sum would be a bias: they are used as they are, and their sum is the coefficient of the
log-sum-exp. H(w) of such weights is no estimate of the teacher's entropy, so KLD is then NLL.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from student_train.objective.kept_entries import KeptEntries
from student_train.objective.names import LOSSES, STRATEGIES
from student_train.objective.temperatures import adapt

# Pairs of options that do not go together: the loss would ignore one, or needs what is unknown.
_EXCLUSIVE = (
    ("sampled", "mse"),
    ("sampled", "bucket"),
    ("sampled", "adaptive_temperature"),
    ("bucket", "mse"),
    ("bucket", "temperature"),
    ("bucket", "student_temperature"),
    ("bucket", "adaptive_temperature"),
    ("mse", "student_temperature"),
    ("mse", "adaptive_temperature"),
)


class Targets(NamedTuple):
    """The teacher's kept entries of T positions.

    tail_logmass [T] is for the bucket alone, entropies [T] (nats) for "adakd-h" where they are
    stored.
    """

    entries: KeptEntries
    tail_logmass: Tensor | None = None
    entropies: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised: `kind` "kld", "nll" or "mse", `alpha` the weight of KD, the teacher's tau.

    `sampled`: the targets are weights of a sampling keep method, whatever the temperature.
    `bucket`: what was not kept is one more class; at temperature 1, of kld and nll.
    `student_temperature` other than 1 is for `distil_tempered`, of kld and nll without the bucket.
    `adaptive_temperature`: a strategy of `temperatures`, of kld and nll without the bucket.
    """

    kind: str
    alpha: float
    temperature: float
    sampled: bool = False
    bucket: bool = False
    student_temperature: float = 1.0
    adaptive_temperature: str | None = None

    def __post_init__(self) -> None:
        """ValueError for an unknown name, or for two options that do not go together."""
        for name, value, names in (
            ("kind", self.kind, LOSSES),
            ("adaptive_temperature", self.adaptive_temperature, (None, *STRATEGIES)),
        ):
            if value not in names:
                raise ValueError(f"{name} {value!r}: expected {', '.join(map(str, names))}")
        used = {
            "sampled": self.sampled,
            "bucket": self.bucket,
            "mse": self.kind == "mse",
            "temperature": self.temperature != 1,
            "student_temperature": self.student_temperature != 1,
            "adaptive_temperature": self.adaptive_temperature is not None,
        }
        for pair in _EXCLUSIVE if self.alpha else ():
            if all(used[name] for name in pair):
                raise ValueError(" does not go with ".join(pair))


@dataclass(frozen=True, kw_only=True)
class Entries:
    """The entries of a block: ids [R, K] int64, logprobs, the student's logits there [R, K].

    Where a logprob is -inf there is no entry, whatever the id, which must be one all the same.
    `logsumexp` [R, 1] is that of all the student's logits, `tail_logmass` and `entropies` [R, 1]
    the teacher's.
    """

    ids: Tensor
    logprobs: Tensor
    logits: Tensor
    logsumexp: Tensor
    tail_logmass: Tensor | None
    entropies: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """Which of them are entries [R, K]."""
        return self.logprobs > float("-inf")


def distil(probabilities: Tensor, entries: Entries, objective: Objective) -> tuple[Tensor, Tensor]:
    """The sum of KD over a block, and a coefficient [R, 1].

    `probabilities` [R, V], the student's softmax, become what, times the coefficient, is the
    gradient of alpha * KD + (1 - alpha) * logsumexp.
    """
    if objective.kind == "mse":
        return _mean_squared(probabilities, entries, objective)
    if objective.bucket:
        return _bucket(probabilities, entries, objective)
    return _soft_targets(probabilities, entries, objective)


def distil_tempered(
    probabilities: Tensor,
    tempered: Tensor,
    tempered_logsumexp: Tensor,
    entries: Entries,
    objective: Objective,
) -> tuple[Tensor, Tensor]:
    """As `distil`, with the student at `student_temperature` in KD.

    `tempered` [R, V], the softmax of the student's logits divided by it, is overwritten;
    `tempered_logsumexp` [R, 1] is theirs.
    """
    alpha, tau = objective.alpha, objective.student_temperature
    entries = replace(entries, logits=entries.logits / tau, logsumexp=tempered_logsumexp)
    # The gradient of KD to z / tau, thus 1 / tau of it to z, times tau^2.
    kd, coefficient = distil(tempered, entries, replace(objective, alpha=1.0))
    probabilities.mul_(1 - alpha).addcmul_(tempered, alpha * tau * coefficient)
    return tau**2 * kd, torch.ones_like(coefficient)


def _soft_targets(
    probabilities: Tensor, entries: Entries, objective: Objective
) -> tuple[Tensor, Tensor]:
    alpha = objective.alpha
    if objective.sampled:
        target = entries.logprobs.exp()
        mass = target.sum(1, keepdim=True)
        entropy = torch.zeros_like(mass)
    else:
        temperature, weight = adapt(
            entries.logprobs,
            objective.temperature,
            objective.adaptive_temperature,
            entries.entropies,
        )
        target = torch.softmax(entries.logprobs / temperature, 1)
        target = torch.where(entries.kept, target, 0.0)
        mass = weight * entries.kept.any(1, keepdim=True).to(target.dtype)
        entropy = weight * torch.special.entr(target).sum(1, keepdim=True)
        target *= weight
    kd = (target * (entries.logsumexp - entries.logits)).sum()
    if objective.kind == "kld":
        kd = kd - entropy.sum()
    coefficient = (1 - alpha) + alpha * mass
    # Taken out of the row, so that it costs no pass over [R, V]. It is 0 only with the row.
    target *= -alpha / torch.where(coefficient > 0, coefficient, 1.0)
    probabilities.scatter_add_(1, entries.ids, target)
    return kd, coefficient


def _bucket(probabilities: Tensor, entries: Entries, objective: Objective) -> tuple[Tensor, Tensor]:
    assert entries.tail_logmass is not None
    alpha = objective.alpha
    logs = torch.log_softmax(torch.cat([entries.logprobs, entries.tail_logmass], 1), 1)
    nothing = logs.isnan()  # neither an entry nor a tail
    target = torch.where(nothing, float("-inf"), logs).exp()
    target, tail = target[:, :-1], target[:, -1:]
    # The student's rest is summed up: 1 minus the others has no digits where it is small.
    student = torch.where(entries.kept, probabilities.gather(1, entries.ids), 0.0)
    probabilities.scatter_add_(1, entries.ids, -student)
    rest = probabilities.sum(1, keepdim=True).clamp_(min=torch.finfo(student.dtype).tiny)
    kd = (target * (entries.logsumexp - entries.logits)).sum() - (tail * rest.log()).sum()
    if objective.kind == "kld":
        kd = kd - torch.special.entr(target).sum() - torch.special.entr(tail).sum()
    coefficient = (1 - alpha) + alpha * (target.sum(1, keepdim=True) + tail)
    probabilities.mul_(coefficient - alpha * tail / rest)
    probabilities.scatter_add_(1, entries.ids, coefficient * student - alpha * target)
    return kd, torch.ones_like(coefficient)


def _mean_squared(
    probabilities: Tensor, entries: Entries, objective: Objective
) -> tuple[Tensor, Tensor]:
    alpha, kept = objective.alpha, entries.kept
    number = kept.sum(1, keepdim=True).clamp(min=1).to(entries.logits.dtype)

    def centred(values: Tensor) -> Tensor:
        values = torch.where(kept, values, 0.0)
        return torch.where(kept, values - values.sum(1, keepdim=True) / number, 0.0)

    distance = centred(entries.logits) - centred(entries.logprobs / objective.temperature)
    probabilities.mul_(1 - alpha)
    probabilities.scatter_add_(1, entries.ids, distance * (2 * alpha / number))
    return (distance.square() / number).sum(), torch.ones_like(entries.logsumexp)
