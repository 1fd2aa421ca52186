"""What a person sees of a running pass: one line on standard error, rewritten in place.

Off when standard error is not a terminal; then a log line every half minute says the same.
"""

from __future__ import annotations

import logging
import sys
import time

logger = logging.getLogger(__name__)

_REDRAW_EVERY_S = 0.2
_LOG_EVERY_S = 30.0


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s`, `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole} s"


def count(number: float) -> str:
    """`1,234`, `56.7k`, `8.90M`, `1.23B`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            scaled = number / (1e3 if unit == "k" else size)
            return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f}{unit}"
    return f"{number:,.0f}"


class ProgressLine:
    """One line that is redrawn in place on a terminal, and logged now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown_at = 0.0 if self._terminal else time.monotonic()
        self._width = 0

    def due(self) -> bool:
        """Whether enough time has passed to show again."""
        every = _REDRAW_EVERY_S if self._terminal else _LOG_EVERY_S
        return time.monotonic() - self._shown_at >= every

    def show(self, text: str) -> None:
        """Show a line now."""
        self._shown_at = time.monotonic()
        if not self._terminal:
            logger.info(text)
            return
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)

    def clear(self) -> None:
        """Leave the terminal's line empty for what comes next."""
        if self._terminal and self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
            self._width = 0


class PassProgress:
    """Sequences, tokens/s, entries and bytes per token and the time left of a teacher pass."""

    def __init__(self, num_sequences: int, num_positions: int) -> None:
        self._line = ProgressLine()
        self._started = time.monotonic()
        self._of_sequences, self._of_positions = num_sequences, num_positions
        self.sequences = self.positions = self.entries = 0
        self.written_bytes = self.written_positions = 0

    def scored(self, positions: int, entries: int) -> None:
        """Count a scored sequence and show the line when it is time."""
        self.sequences += 1
        self.positions += positions
        self.entries += entries
        if self._line.due():
            self._line.show(self._text())

    def wrote(self, positions: int, num_bytes: int) -> None:
        """Count a published shard."""
        self.written_positions += positions
        self.written_bytes += num_bytes

    @property
    def seconds(self) -> float:
        """Time since the pass began, the start of the engine not included."""
        return time.monotonic() - self._started

    def finish(self) -> None:
        """Take the line away."""
        self._line.clear()

    def _text(self) -> str:
        speed = self.positions / self.seconds
        left = (self._of_positions - self.positions) / speed
        parts = [
            f"{self.sequences:,} of {self._of_sequences:,} sequences",
            f"{count(speed)} tokens/s",
            f"{self.entries / self.positions:.1f} entries/token",
        ]
        if self.written_positions:
            parts.append(f"{self.written_bytes / self.written_positions:.1f} bytes/token")
        return ", ".join([*parts, f"{duration(left)} left"])
