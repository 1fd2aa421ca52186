"""Runs the commands of the project as processes, and ends them together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent.parent
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Failed(SystemExit):
    """A command of the project failed; its own message stands above."""


class Commands:
    """Runs the project's commands until the time is over or a signal comes."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopped, self._lock = False, threading.Lock()
        for number in _SIGNALS:
            signal.signal(number, _stop)

    def run(self, *words: object, threads: int | None = None, output: Path | None = None) -> None:
        """Run a command, its output into a file if one is named. Failed, or SystemExit if stopped.

        A command that is stopped saves its work first. `threads`: of torch; None for all.
        """
        texts = [str(word) for word in words]
        environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "cli.py", *texts]
        with nullcontext() if output is None else output.open("wb") as stream:
            with self._lock:
                if self._stopped:
                    raise SystemExit(1)
                print("$", *texts, flush=True)
                child = subprocess.Popen(
                    command, cwd=ROOT, stdout=stream, env=os.environ | environment
                )
                self._children.add(child)
            left = None if self._end is None else max(0.0, self._end - time.monotonic())
            try:
                code = child.wait(left)
            except subprocess.TimeoutExpired:
                self.stop()
                raise SystemExit("the time is over; the same command continues") from None
            finally:
                self._children.discard(child)
        if self._stopped:
            raise SystemExit(1)
        if code:
            raise Failed(f"{texts[0]} ended with code {code}")

    def stop(self) -> None:
        """End all commands, and let them save their work.

        Only a signal that cannot be caught ends this earlier.
        """
        with self._lock:
            self._stopped = True
            children = tuple(self._children)
        for child in children:
            child.terminate()
        for child in children:
            child.wait()


def _stop(number: int, _: object) -> NoReturn:
    for each in _SIGNALS:
        signal.signal(each, _nothing)
    raise SystemExit(128 + number)


def _nothing(number: int, _: object) -> None:
    """Not SIG_IGN, which a command that starts now would inherit."""
