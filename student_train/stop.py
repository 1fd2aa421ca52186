"""Signals that end a run at the next step instead of at once: SIGTERM, SIGUSR1 and Ctrl-C.

A second signal of the same kind acts as it would without this, at once
(`shards/process/stop_signals.py`). Under torchrun one that follows within seconds is the same
signal: Slurm sends it to every process of a job step, and torchrun passes on its own.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Self

from shards.process.stop_signals import STOP_SIGNALS
from student_train.processes.world import under_torchrun

_SAME_SIGNAL_S = 5.0
SIGNALS = (*STOP_SIGNALS, signal.SIGINT)


class StopRequest:
    """A context in which `received` is the signal that asked for an end, or None.

    Only in the main thread, where Python handles signals; elsewhere nothing is ever received. One
    that the process was started to ignore stays ignored.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at: dict[int, float] = {}
        self._before: dict[signal.Signals, signal.Handlers | object] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                self._before[number] = signal.signal(number, self._receive)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._before):
            self._restore(number)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if not under_torchrun():
            self._restore(self.received)
            return
        first = self._at.setdefault(number, time.monotonic())
        if time.monotonic() - first > _SAME_SIGNAL_S:
            self._restore(self.received)
            os.kill(os.getpid(), number)

    def _restore(self, number: signal.Signals) -> None:
        before = self._before.pop(number, None)
        if before is not None:
            signal.signal(number, before)  # type: ignore[arg-type]
