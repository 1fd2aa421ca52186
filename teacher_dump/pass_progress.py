"""What a person sees of a running pass: sequences, speed, size and the time left."""

from __future__ import annotations

import time

from shards.process.progress import ProgressLine, count, duration
from shards.row_group import Totals


class PassProgress:
    """Sequences, tokens/s, entries and bytes per token and the time left of a teacher pass."""

    def __init__(self) -> None:
        self._line = ProgressLine()
        self._started = time.monotonic()
        self._of_sequences = self._of_positions = 0
        self.sequences = self.positions = self.entries = 0
        self.written = Totals()
        self.written_bytes = self.written_shards = 0

    def expect(self, num_sequences: int, num_positions: int) -> None:
        """Count a shard that is to be written."""
        self._of_sequences += num_sequences
        self._of_positions += num_positions

    def scored(self, positions: int, entries: int) -> None:
        """Count a scored sequence and show the line when it is time."""
        self.sequences += 1
        self.positions += positions
        self.entries += entries
        self.show_when_due()

    def show_when_due(self) -> None:
        """Show the line if enough time has passed."""
        if self._line.due() and self.positions:
            self._line.show(self._text())

    def wrote(self, totals: Totals, num_bytes: int, num_shards: int = 1) -> None:
        """Count published shards."""
        self.written += totals
        self.written_bytes += num_bytes
        self.written_shards += num_shards

    @property
    def seconds(self) -> float:
        """Time since the pass began, the start of the engine not included."""
        return time.monotonic() - self._started

    def finish(self) -> None:
        """Take the line away."""
        self._line.clear()

    def _text(self) -> str:
        speed = self.positions / self.seconds
        left = max(0, self._of_positions - self.positions) / speed
        parts = [
            f"{self.sequences:,} of {self._of_sequences:,} sequences",
            f"{count(speed)} tokens/s",
            f"{self.entries / self.positions:.1f} entries/token",
        ]
        if self.written.tokens:
            parts.append(f"{self.written_bytes / self.written.tokens:.1f} bytes/token")
        return ", ".join([*parts, *self._more(), f"{duration(left)} left"])

    def _more(self) -> list[str]:
        """What a subclass adds to the line."""
        return []
