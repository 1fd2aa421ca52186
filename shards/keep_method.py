"""How the kept entries of a dataset are to be read, as its identity says it.

Truncating methods store probabilities of the largest entries, and the mass that is missing.
Sampling methods store weights whose expectation is the probability, over many small draws; a single
position's weights are no distribution and do not sum to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SAMPLING_METHODS = ("draws", "threshold")


@dataclass(frozen=True, kw_only=True)
class KeepMethod:
    """The keep method of a dataset.

    `temperature` is that of the distribution which was sampled, 1 for truncating methods.
    `exact_above`: entries stored above this log-probability were kept because of their size, not by
    chance, so the largest of them is the teacher's largest; None if chance decided over all.
    """

    name: str
    temperature: float = 1.0
    exact_above: float | None = float("-inf")

    @classmethod
    def of(cls, identity: Mapping[str, Any]) -> KeepMethod:
        """What the identity of a dataset records."""
        keep = identity["keep"]
        if keep["method"] not in SAMPLING_METHODS:
            return cls(name=keep["method"])
        return cls(
            name=keep["method"],
            temperature=keep["temperature"],
            exact_above=_exact_above(keep),
        )

    @property
    def is_sampled(self) -> bool:
        """Whether entries are weights that chance decided over."""
        return self.name in SAMPLING_METHODS


def _exact_above(keep: Mapping[str, Any]) -> float | None:
    """Half a step above what sampled entries are stored at: float32 is not exact for every step."""
    if "log_threshold" not in keep:
        return None
    return float(keep["log_threshold"] + keep["logprob_step"] / 2)
