"""A progress line on standard error, rewritten in place.

If standard error is not a terminal, a log line every half minute says the same. Teacher pass and
trainer both use it.
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
