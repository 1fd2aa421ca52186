"""The progress line of training: step, loss, learning rate, speed and the time left."""

from __future__ import annotations

import time
from collections.abc import Mapping

from shards.process.progress import ProgressLine, duration


class TrainProgress:
    """Shows step, tokens, loss and its parts, alpha, learning rate, speed and the time left.

    With `peak_tokens_per_s` (`flops.py`) also the model FLOP utilisation.
    """

    def __init__(self, step: int, num_steps: int, peak_tokens_per_s: float | None = None) -> None:
        self._first_step, self._num_steps = step, num_steps
        self._peak_tokens_per_s = peak_tokens_per_s
        self._tokens = 0
        self._started = time.monotonic()
        self._paused_s = 0.0
        self._line = ProgressLine()

    def pause(self, seconds: float) -> None:
        """Leave this time, of an evaluation or a checkpoint, out of the speed."""
        self._paused_s += seconds

    @property
    def seconds(self) -> float:
        """Time spent on training steps."""
        return time.monotonic() - self._started - self._paused_s

    @property
    def tokens_per_s(self) -> float:
        """Labelled positions per second of training steps."""
        return self._tokens / max(self.seconds, 1e-9)

    def trained(self, step: int, num_tokens: int, figures: Mapping[str, float]) -> None:
        """Count a step's tokens, and show the line when it is time."""
        self._tokens += num_tokens
        if not self._line.due():
            return
        left = self.seconds / (step - self._first_step) * (self._num_steps - step)
        parts = [
            f"step {step:,} of {self._num_steps:,}",
            f"{figures['tokens']:,} tokens",
            f"loss {figures['loss']:.4f} (lm {figures['lm']:.4f}, kd {figures['kd']:.4f})",
            f"alpha {figures['alpha']:.2f}",
            f"lr {figures['learning_rate']:.2e}",
            f"{self.tokens_per_s:,.0f} tokens/s",
        ]
        if self._peak_tokens_per_s is not None:
            parts.append(f"MFU {self.tokens_per_s / self._peak_tokens_per_s:.1%}")
        parts.append(f"{duration(left)} left")
        self._line.show(", ".join(parts))

    def clear(self) -> None:
        """Leave the terminal's line empty for what comes next."""
        self._line.clear()
