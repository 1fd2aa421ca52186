"""A background thread that makes the next items while the current one is used.

An error in the thread is raised at the next call. The thread never outlives its `with` block: it
waits for room in the queue only while the consumer may still take items.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, Self, TypeVar

_T = TypeVar("_T")

_CHECK_EVERY_S = 0.1


class ReadAhead(Generic[_T]):
    """Iterates over `items`, at most `depth` of them ahead; a context manager that stops it.

    `items` is consumed, and closed if it is a generator, in the thread.
    """

    def __init__(self, items: Iterator[_T], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[_T] | BaseException] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _T:
        """The next item. Raises what the thread raised; after that, and at the end, stops."""
        if self._stopped.is_set():
            raise StopIteration
        outcome = self._queue.get()
        if isinstance(outcome, tuple):
            return outcome[0]
        self._stopped.set()
        raise outcome

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put((item,)):
                    break
            else:
                self._put(StopIteration())
        except BaseException as error:
            self._put(error)
        finally:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()

    def _put(self, outcome: tuple[_T] | BaseException) -> bool:
        """Wait for room; False if nobody will take it any more."""
        while not self._stopped.is_set():
            try:
                self._queue.put(outcome, timeout=_CHECK_EVERY_S)
            except queue.Full:
                continue
            return True
        return False
