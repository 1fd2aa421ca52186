"""The learning rate as a function of the step: nothing to save, nothing to restore on resume.

Both schedules rise linearly over the warm-up and end at `floor`, as fractions of the peak:

- `wsd` (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395): at the peak until the last
  `decay_steps`, then linearly down. A run can be lengthened before its decay without a trace.
- `cosine` (Loshchilov and Hutter 2017, arXiv 1608.03983): half a cosine from the peak down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The learning rate of steps 0 to num_steps - 1; `kind` is "wsd" or "cosine"."""

    kind: str
    peak: float
    num_steps: int
    warmup_steps: int
    decay_steps: int
    floor: float

    def at(self, step: int) -> float:
        """The learning rate of one step; the last step's is at the floor, none is above the peak.

        Step 0 already learns: the warm-up counts the steps as if they had begun one earlier.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        done = step + 1 - self.warmup_steps
        falling = self.decay_steps if self.kind == "wsd" else self.num_steps - self.warmup_steps
        flat = self.num_steps - self.warmup_steps - falling
        if done <= flat:
            return self.peak
        progress = (done - flat) / falling
        left = 1 - progress if self.kind == "wsd" else (1 + math.cos(math.pi * progress)) / 2
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
