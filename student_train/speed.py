"""Time and memory of every step: how fast training is, and what limits it.

These figures differ from run to run, so they are kept apart from what a step computes
(`metrics.py`).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch

_T = TypeVar("_T")

# Figures of the process that they are worst for: it makes all others wait, or fail.
LIMITS = frozenset({"data_wait", "peak_memory_bytes", "peak_cuda_memory_bytes"})

_STATUS = Path("/proc/self/status")


class StepClock:
    """Times steps; each begins where its batches are asked for, and ends with `step_done`.

    `peak_tokens_per_s` is that of `flops.py`, None if it is not known.
    """

    def __init__(self, device: torch.device, peak_tokens_per_s: float | None) -> None:
        self._device = device
        self._peak_tokens_per_s = peak_tokens_per_s
        self._started = time.monotonic()
        self._waited_s = 0.0

    def waiting(self, batches: Iterator[_T]) -> Iterator[_T]:
        """The same batches, begin a step, and count the time that `batches` takes to give them."""
        self._started = time.monotonic()
        self._waited_s = 0.0
        return self._timed(batches)

    def step_done(self, num_tokens: int) -> dict[str, float]:
        """Figures of the step; `docs/training.md` says what they mean."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        tokens_per_s = num_tokens / seconds
        figures: dict[str, float] = {
            "seconds": seconds,
            "tokens_per_s": tokens_per_s,
            "data_wait": self._waited_s / seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if self._device.type == "cuda":
            figures["peak_cuda_memory_bytes"] = torch.cuda.max_memory_allocated(self._device)
        if self._peak_tokens_per_s is not None:
            figures["flop_utilisation"] = tokens_per_s / self._peak_tokens_per_s
        return figures

    def _timed(self, batches: Iterator[_T]) -> Iterator[_T]:
        while True:
            asked = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited_s += time.monotonic() - asked
            yield batch


def peak_memory_bytes() -> int:
    """The most memory this process ever had resident; pages of mapped shards are part of it.

    getrusage begins with the peak of the process that started this one, Linux's VmHWM does not.
    """
    if _STATUS.is_file():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
