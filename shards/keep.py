"""The keep methods: what the shards store of a teacher's distribution, with options and reading.

    top-p-k    the smallest set of entries that reaches a mass, at most k of them. Biased: it cuts
               off rare tokens at every position ("Pre-training Distillation", arXiv 2410.16215)
    draws      n draws with replacement, weights count / n. Unbiased ("Sparse Logit Sampling",
               RS-KD, arXiv 2503.16870)
    threshold  every entry with p >= t exactly, every other one with probability p / t and weight t,
               by systematic sampling (Madow 1949; threshold sampling: Duffield, Lund and Thorup
               2007). Unbiased, with fewer entries than draws at the same variance
    tokens     nothing: the dataset has no teacher

Truncating methods store probabilities of the largest entries, and the mass that is missing.
Sampling methods store weights whose expectation is the probability. The weights of one position
are not a distribution and do not sum to 1.

A method is a frozen dataclass whose fields are its options on the command line and its keys in a
manifest. Defining a subclass of `Keep` with a `method` makes it known to all commands. Its selector
is registered separately (`teacher_dump.keep.selection.make_selector`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from shards.options import check, option

MIN_THRESHOLD = 1e-3  # a thousand entries per position; below it sampling saves nothing
MAX_DRAWS = 1 << 16
MIN_LOGPROB_STEP = 1e-4
KEEP_METHODS: dict[str, type[Keep]] = {}


@dataclass(frozen=True, kw_only=True)
class Keep(ABC):
    """Common to all methods. OptionError for invalid values.

    `is_sampled`: entries are random weights. `has_tail`: shards store the mass that was not kept.
    `needs_distribution`: the method cannot select from the largest entries alone.
    """

    method: ClassVar[str]
    is_sampled: ClassVar[bool] = False
    has_tail: ClassVar[bool] = False
    needs_distribution: ClassVar[bool] = True

    # Temperature of the distribution that entries are selected from; 1 for truncating methods.
    temperature = 1.0
    # Stored log-probabilities are multiples of this, nats.
    logprob_step = 0.0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "method" in vars(cls):
            KEEP_METHODS[cls.method] = cls

    @abstractmethod
    def max_entries(self, vocab_size: int) -> int:
        """The maximum number of entries of a position."""

    @property
    def exact_above(self) -> float | None:
        """Entries stored above this log-probability were kept for certain.

        So the largest of them is the teacher's largest. None: all entries were random.
        """
        return -math.inf


def _logprob_step() -> float:
    step: float = option(
        "Round stored log-probabilities to multiples of this many nats.",
        default=1 / 16,
        metavar="NATS",
    )
    return step


def _temperature() -> float:
    temperature: float = option(
        "Temperature of the distribution to sample from. train-student must use the same one.",
        default=1.0,
    )
    return temperature


def _check_step(step: float) -> None:
    check(MIN_LOGPROB_STEP <= step <= 1, "logprob_step", step, f"nats in [{MIN_LOGPROB_STEP}, 1]")


def _check_temperature(temperature: float) -> None:
    check(0.01 <= temperature <= 100, "temperature", temperature, "a value in [0.01, 100]")


@dataclass(frozen=True, kw_only=True)
class TopPK(Keep):
    """Keep the smallest prefix whose mass reaches `top_p`, then at most `top_k` of it."""

    method: ClassVar[str] = "top-p-k"
    has_tail: ClassVar[bool] = True
    needs_distribution: ClassVar[bool] = False

    top_p: float = option(
        "Keep the smallest set of entries that has this mass, at most --top-k of them.",
        default=0.95,
    )
    top_k: int = option("Keep at most this many entries per position.", default=100)
    logprob_step: float = _logprob_step()

    def __post_init__(self) -> None:
        check(0 < self.top_p <= 1, "top_p", self.top_p, "a value in (0, 1]")
        check(self.top_k >= 1, "top_k", self.top_k, "at least 1")
        _check_step(self.logprob_step)

    def max_entries(self, vocab_size: int) -> int:
        return min(self.top_k, vocab_size)


@dataclass(frozen=True, kw_only=True)
class Draws(Keep):
    """Keep the entries that `draws` draws with replacement hit, at `temperature`."""

    method: ClassVar[str] = "draws"
    is_sampled: ClassVar[bool] = True

    draws: int = option("Number of draws per position, with replacement.", default=50)
    temperature: float = _temperature()
    logprob_step: float = _logprob_step()

    def __post_init__(self) -> None:
        check(1 <= self.draws <= MAX_DRAWS, "draws", self.draws, f"a number from 1 to {MAX_DRAWS}")
        _check_temperature(self.temperature)
        _check_step(self.logprob_step)

    def max_entries(self, vocab_size: int) -> int:
        return min(self.draws, vocab_size)

    @property
    def exact_above(self) -> float | None:
        return None


@dataclass(frozen=True, kw_only=True)
class Threshold(Keep):
    """Keep entries of at least `threshold` at `temperature`, sample the others.

    The threshold is rounded to exp(-n * logprob_step), so that the weight t needs no rounding when
    it is stored. Otherwise all sampled weights would be wrong by the same factor, which is a bias.
    """

    method: ClassVar[str] = "threshold"
    is_sampled: ClassVar[bool] = True

    threshold: float = option(
        "Keep every entry with at least this probability, and sample the others. The command "
        "rounds the value so that its logarithm is a multiple of --logprob-step.",
        default=0.05,
    )
    temperature: float = _temperature()
    logprob_step: float = _logprob_step()

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        _check_step(self.logprob_step)
        # This checks the rounded value, with half a step (and the last bits of a float) to spare,
        # so that a value that was rounded before is accepted again.
        holds = 0 < self.threshold <= 1
        least = math.log(MIN_THRESHOLD) - self.logprob_step / 2 - 1e-9
        holds = holds and self.log_threshold >= least
        check(holds, "threshold", self.threshold, f"a value in [{MIN_THRESHOLD}, 1]")
        object.__setattr__(self, "threshold", math.exp(self.log_threshold))

    @property
    def threshold_steps(self) -> int:
        """n: the threshold lies this many steps below 1."""
        return round(-math.log(self.threshold) / self.logprob_step)

    @property
    def log_threshold(self) -> float:
        """log t, nats."""
        return -self.threshold_steps * self.logprob_step

    def max_entries(self, vocab_size: int) -> int:
        """1 / t + 1 at most; the margin is for sums that are rounded."""
        return min(vocab_size, math.floor(1.0001 / self.threshold) + 1)

    @property
    def exact_above(self) -> float | None:
        # Half a step above what sampled entries are stored at: float32 is not exact everywhere.
        return self.log_threshold + self.logprob_step / 2


@dataclass(frozen=True, kw_only=True)
class Tokens(Keep):
    """Keep nothing of a distribution: tokens alone, without a teacher."""

    method: ClassVar[str] = "tokens"
    needs_distribution: ClassVar[bool] = False

    def max_entries(self, vocab_size: int) -> int:
        return 0
