"""Learning rate and alpha as functions of the step: nothing to save, nothing to restore on resume.

The learning rate rises linearly over the warm-up and ends at `floor`, as fractions of the peak:

- `wsd` (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395): at the peak until the last
  `decay_steps`, then linearly down. A run can be lengthened before its decay without a trace.
- `wsd-sqrt`: as `wsd`, but falling as 1 - sqrt (Hagele et al. 2024, arXiv 2405.18392)
- `constant`: at the peak after the warm-up, also at the end
- `cosine` (Loshchilov and Hutter 2017, arXiv 1608.03983): half a cosine from the peak down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LR_SCHEDULES = ("constant", "cosine", "wsd", "wsd-sqrt")
ALPHA_SCHEDULES = ("constant", "linear-increase", "linear-decrease", "period", "wsd")
PERIODS = 10  # of "period" in a run


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The learning rate of steps 0 to num_steps - 1; `kind` is one of `LR_SCHEDULES`."""

    kind: str
    peak: float
    num_steps: int
    warmup_steps: int
    decay_steps: int
    floor: float

    def at(self, step: int) -> float:
        """The learning rate of one step, never above the peak; the last one's is at the floor.

        Step 0 already learns: the warm-up counts the steps as if they had begun one earlier.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        done = step + 1 - self.warmup_steps
        falling = self.decay_steps
        if self.kind == "cosine":
            falling = self.num_steps - self.warmup_steps
        elif self.kind == "constant":
            falling = 0
        flat = self.num_steps - self.warmup_steps - falling
        if done <= flat:
            return self.peak
        progress = (done - flat) / falling
        if self.kind == "cosine":
            left = (1 + math.cos(math.pi * progress)) / 2
        else:
            left = 1 - (math.sqrt(progress) if self.kind == "wsd-sqrt" else progress)
        return self.peak * (self.floor + (1 - self.floor) * left)


def learning_rate(
    kind: str,
    *,
    peak: float,
    num_steps: int,
    warmup_fraction: float,
    decay_fraction: float,
    floor: float,
) -> LearningRate:
    """A schedule whose phases are fractions of the run, rounded to whole steps."""
    warmup_steps = round(warmup_fraction * num_steps)
    return LearningRate(
        kind=kind,
        peak=peak,
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        decay_steps=min(round(decay_fraction * num_steps), num_steps - warmup_steps),
        floor=floor,
    )


@dataclass(frozen=True, kw_only=True)
class Alpha:
    """The weight of distillation at steps 0 to num_steps - 1, `peak` at most.

    The dimension is one of pre-training distillation (Peng et al., arXiv 2410.16215); its phases
    are defined here:

    - `constant`: the peak
    - `linear-increase`: from 0 at the first step to the peak at the last
    - `linear-decrease`: from the peak at the first step to 0 at the last
    - `period`: ten periods; in each the first half at the peak, the second at 0
    - `wsd`: rises over the warm-up of the learning rate, stays, and falls to 0 over its decay
    """

    kind: str
    peak: float
    num_steps: int
    warmup_fraction: float
    decay_fraction: float

    def at(self, step: int) -> float:
        """Alpha of one step."""
        return self.peak * self._share(step)

    def _share(self, step: int) -> float:
        last = max(1, self.num_steps - 1)
        if self.kind == "constant":
            return 1.0
        if self.kind == "linear-increase":
            return step / last
        if self.kind == "linear-decrease":
            return 1 - step / last
        if self.kind == "period":
            return float(2 * PERIODS * step // self.num_steps % 2 == 0)
        rate = learning_rate(
            "wsd",
            peak=1.0,
            num_steps=self.num_steps,
            warmup_fraction=self.warmup_fraction,
            decay_fraction=self.decay_fraction,
            floor=0.0,
        )
        return rate.at(step)
