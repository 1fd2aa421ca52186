"""SIGTERM and SIGUSR1 end a command as Ctrl-C does: by an error, and with a line that says so.

Schedulers send them some time before they kill. The error lets files that are not finished be
removed, which a process that the signal ends would leave.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from shards.errors import StoppedError

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """A context in which these signals raise StoppedError, wherever the main thread is.

    Python handles signals in the main thread only; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    name = signal.Signals(number).name
    raise StoppedError(f"stopped by {name}; the same command continues", number)
