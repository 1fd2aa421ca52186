"""SIGTERM and SIGUSR1 end a command as Ctrl-C does: by an exception, and with one line.

Schedulers send them some time before they kill. The exception lets the process remove unfinished
files. A second signal of the same kind has its default effect, so code that does not return cannot
block it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from shards.errors import StoppedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class _Stopped(BaseException):
    """Like KeyboardInterrupt not an Exception, because libraries catch those and continue."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """A context that these signals end with StoppedError, wherever the main thread is.

    One that the process was started to ignore stays ignored. Python handles signals in the main
    thread only; in another one this does nothing.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _stop)
    try:
        yield
    except _Stopped as error:
        raise StoppedError(
            f"stopped by {error.number.name}; run the same command again to continue",
            error.number,
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    raise _Stopped(signal.Signals(number))
