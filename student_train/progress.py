"""What a person sees of a running training: one line on standard error, rewritten in place.

Off when standard error is not a terminal; then a log line every half minute says the same.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping

logger = logging.getLogger(__name__)

_REDRAW_EVERY_S = 0.2
_LOG_EVERY_S = 30.0


class TrainProgress:
    """Shows step, tokens, loss and its parts, learning rate, speed and the time left."""

    def __init__(self, step: int, num_steps: int) -> None:
        self._first_step, self._num_steps = step, num_steps
        self._tokens = 0
        self._started = time.monotonic()
        self._paused_s = 0.0
        self._terminal = sys.stderr.isatty()
        self._shown_at = 0.0 if self._terminal else self._started
        self._width = 0

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
        every = _REDRAW_EVERY_S if self._terminal else _LOG_EVERY_S
        if time.monotonic() - self._shown_at < every:
            return
        left = self.seconds / (step - self._first_step) * (self._num_steps - step)
        parts = [
            f"step {step:,} of {self._num_steps:,}",
            f"{figures['tokens']:,} tokens",
            f"loss {figures['loss']:.4f} (lm {figures['lm']:.4f}, kd {figures['kd']:.4f})",
            f"lr {figures['learning_rate']:.2e}",
            f"{self.tokens_per_s:,.0f} tokens/s",
            f"{_duration(left)} left",
        ]
        self._show(", ".join(parts))

    def clear(self) -> None:
        """Leave the terminal's line empty for what comes next."""
        if self._terminal and self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
            self._width = 0

    def _show(self, text: str) -> None:
        self._shown_at = time.monotonic()
        if not self._terminal:
            logger.info(text)
            return
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)


def _duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s`, `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole} s"
