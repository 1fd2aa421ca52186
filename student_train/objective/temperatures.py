"""The teacher's temperature of every position, and the position's weight, from its kept entries.

Letters: R rows, K kept entries. n entries are kept at a position, logp their log-probabilities,
p = softmax(logp) over them, tau the `temperature` option. By strategy, with sources:

- None: tau everywhere, the static temperature of Peng et al. (arXiv 2410.16215)
- "normkd": tau * s, s the deviation of the teacher's logits (Chi et al. 2023, NormKD, arXiv
  2308.00520, with their code: github.com/gizi1/NormKD, whose T_norm is our tau). There the
  student's logits are divided by their own deviation too and the loss is multiplied by (tau * s)^2.
  We leave this out, because F(z) = softmax(Truncate(z) / tau) tempers the teacher alone, and a loss
  that normalises the student does not see the scale of its logits, which matters at temperature 1
- "wttm": tau everywhere, and the weight U = sum_k p_k^(1 / tau) (Zheng and Yang, ICLR 2024, arXiv
  2402.11148, section 4, with their code: github.com/zkxufo/TTM). From 1, one entry, to
  n^(1 - 1 / tau), equal ones: smooth targets count more. Defined for tau above 1
- "adakd-sd": tau * 2^((s - 1) / (s + 1))
- "adakd-h":  tau * 2^((1 - H) / (1 + H)), H the entropy of p, nats

Peng et al. name AdaKD-SD and AdaKD-H without their formulas; both formulas are ours. Where the
teacher is sure (s large, H small) they make the target softer, elsewhere sharper, between tau / 2
and 2 * tau; s or H of 1 nat leave tau. For tau = 1 these are the static temperatures 0.5 to 2 among
which Peng et al. found little difference.

Truncated shards do not hold all logits. So s and U are those of the kept entries, renormalised: of
the truncated teacher, from which the target is made too. H is the teacher's own entropy if the
shards hold it (`entropies`), else that of the kept entries. s divides by n - 1, as its source does,
and does not see the constant between logits and log-probabilities. Where s is 0, "normkd" has tau:
one entry, or n equal ones, have the same target at every temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adapt(
    logprobs: Tensor,
    temperature: float,
    strategy: str | None,
    entropies: Tensor | None = None,
) -> tuple[Tensor | float, Tensor | float]:
    """Temperature and weight, numbers or [R, 1], for logprobs [R, K], -inf where nothing was kept.

    entropies [R, 1], nats, are the teacher's own; None: those of the kept entries are used.

    Always finite and above 0, also where one entry or none was kept; see above.
    """
    if strategy is None:
        return temperature, 1.0
    if strategy == "wttm":
        return temperature, _power_sum(logprobs, 1 / temperature)
    if strategy == "adakd-h":
        entropy = _entropy(logprobs) if entropies is None else entropies
        return temperature * ((1 - entropy) / (1 + entropy)).exp2(), 1.0
    deviation = _deviation(logprobs)
    if strategy == "adakd-sd":
        return temperature * ((deviation - 1) / (deviation + 1)).exp2(), 1.0
    assert strategy == "normkd", strategy
    return temperature * torch.where(deviation > 0, deviation, 1.0), 1.0


def _deviation(logprobs: Tensor) -> Tensor:
    """Standard deviation [R, 1] of the kept entries, n - 1 below; 0 for fewer than two."""
    kept = logprobs > float("-inf")
    number = kept.sum(1, keepdim=True).to(logprobs.dtype)
    values = torch.where(kept, logprobs, 0.0)
    mean = values.sum(1, keepdim=True) / number.clamp(min=1)
    squares = torch.where(kept, values - mean, 0.0).square().sum(1, keepdim=True)
    return torch.sqrt(squares / (number - 1).clamp(min=1))


def _entropy(logprobs: Tensor) -> Tensor:
    """Entropy [R, 1] of the kept entries, renormalised, nats; 0 for fewer than two."""
    probabilities = torch.softmax(logprobs, 1).nan_to_num(nan=0.0)
    entropy: Tensor = torch.special.entr(probabilities).sum(1, keepdim=True)
    return entropy


def _power_sum(logprobs: Tensor, exponent: float) -> Tensor:
    """Sum [R, 1] of the kept entries, renormalised, to a power; 1 where nothing was kept."""
    powers = torch.logsumexp(exponent * logprobs, 1, keepdim=True)
    logs = powers - exponent * torch.logsumexp(logprobs, 1, keepdim=True)
    return torch.exp(torch.nan_to_num(logs, nan=0.0))
