"""What is kept of a position: the three methods with their parameters, as plain values.

    top-p-k    the smallest set of entries that reaches a mass, at most so many of them. Biased:
               rare tokens are cut off at every position ("Pre-training Distillation", arXiv
               2410.16215)
    draws      n draws with replacement, weights count / n. Unbiased ("Sparse Logit Sampling",
               RS-KD, arXiv 2503.16870)
    threshold  every entry with p >= t exactly, every other one with probability p / t and weight t,
               by systematic sampling (Madow 1949; threshold sampling: Duffield, Lund and Thorup
               2007). Unbiased, with fewer entries than draws at the same variance

Nothing here computes anything; `top_p_k` and `sampling` do.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from shards.identity import Json
from teacher_dump.config import DumpConfig

HEADER_WORDS = 4  # of a packed position: count, tail_logmass, label logprob, entropy


@dataclass(frozen=True, kw_only=True)
class Keep(ABC):
    """Common to all methods.

    `logprob_step` is the grid, in nats, that log-probabilities are rounded to; `vocab_size` the
    tokenizer's length: columns beyond it are padding of the model and do not exist here.
    """

    logprob_step: float
    vocab_size: int

    method: ClassVar[str]
    has_tail: ClassVar[bool] = False  # whether the mass that was not kept is recorded

    @property
    @abstractmethod
    def max_entries(self) -> int:
        """The most entries that a position can keep."""

    @property
    def width(self) -> int:
        """int32 words of a packed position."""
        return HEADER_WORDS + 2 * self.max_entries

    @abstractmethod
    def identity(self) -> dict[str, Json]:
        """What a dataset's identity records of the method; `vocab_size` stands elsewhere in it."""

    def to_plain(self) -> dict[str, Any]:
        """Plain values that `from_plain` takes, for another process."""
        return {"method": self.method, **vars(self)}


@dataclass(frozen=True, kw_only=True)
class TopPK(Keep):
    """Keep the smallest prefix whose mass reaches `top_p`, then at most `top_k` of it."""

    top_p: float
    top_k: int

    method: ClassVar[str] = "top-p-k"
    has_tail: ClassVar[bool] = True

    @property
    def max_entries(self) -> int:
        return self.top_k

    def identity(self) -> dict[str, Json]:
        return {
            "method": self.method,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "logprob_step": self.logprob_step,
        }


@dataclass(frozen=True, kw_only=True)
class Draws(Keep):
    """Keep what `draws` draws with replacement hit, at `temperature`."""

    draws: int
    temperature: float

    method: ClassVar[str] = "draws"

    @property
    def max_entries(self) -> int:
        return min(self.draws, self.vocab_size)

    def identity(self) -> dict[str, Json]:
        return {
            "method": self.method,
            "draws": self.draws,
            "temperature": self.temperature,
            "logprob_step": self.logprob_step,
        }


@dataclass(frozen=True, kw_only=True)
class Threshold(Keep):
    """Keep what reaches t = exp(-threshold_steps * logprob_step) at `temperature`, sample the rest.

    t lies on the grid, so that the weight t is stored without rounding: off it, every sampled
    weight would be wrong by the same factor, a bias.
    """

    threshold_steps: int
    temperature: float

    method: ClassVar[str] = "threshold"

    @property
    def log_threshold(self) -> float:
        """log t, nats."""
        return -self.threshold_steps * self.logprob_step

    @property
    def threshold(self) -> float:
        return math.exp(self.log_threshold)

    @property
    def max_entries(self) -> int:
        """1 / t + 1 entries at most; the margin is for sums that are rounded."""
        return min(self.vocab_size, math.floor(1.0001 / self.threshold) + 1)

    def identity(self) -> dict[str, Json]:
        return {
            "method": self.method,
            "log_threshold": self.log_threshold,
            "temperature": self.temperature,
            "logprob_step": self.logprob_step,
        }


def make_keep(config: DumpConfig, vocab_size: int) -> Keep:
    """The method of a configuration, for a tokenizer of this length."""
    common: dict[str, Any] = {"logprob_step": config.logprob_step, "vocab_size": vocab_size}
    options = config.keep_options
    if config.keep == "top-p-k":
        return TopPK(**options, **common)
    if config.keep == "draws":
        return Draws(**options, **common)
    steps = round(-math.log(options.pop("threshold")) / config.logprob_step)
    return Threshold(threshold_steps=steps, **options, **common)


def from_plain(plain: Mapping[str, Any]) -> Keep:
    """The inverse of `Keep.to_plain`."""
    values = dict(plain)
    kinds: dict[str, type[Keep]] = {kind.method: kind for kind in (TopPK, Draws, Threshold)}
    return kinds[values.pop("method")](**values)
