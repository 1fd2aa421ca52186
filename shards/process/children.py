"""Processes that a command's engine starts: they end with it, and leave its signals to it.

An engine process that outlives a killed command would keep a GPU's memory. Linux kills a process
with its parent if it asks for that, and each engine process asks: a forked one right after the
fork, a spawned one when it calls `become_engine_child`.

A scheduler sends its signals to every process of a job. The command stops on them; a child that
died of them first would look like an engine that failed.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

# The id of the process that starts an engine, in the environment of those that it starts.
_STARTED_BY = "LOGITSHARDS_ENGINE_STARTED_BY"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

_starting = False
_forked_by = 0


@contextmanager
def engine_children() -> Iterator[None]:
    """A context in which this process starts engine processes, from its main thread.

    Linux takes the end of the thread that started a process for the end of its parent.
    """
    global _starting
    before = _starting
    _starting, os.environ[_STARTED_BY] = True, str(os.getpid())
    try:
        yield
    finally:
        _starting = before
        del os.environ[_STARTED_BY]


def become_engine_child() -> None:
    """Ask for the parent's death signal and ignore SIGUSR1, in an engine process; else nothing."""
    global _starting
    started_by = os.environ.get(_STARTED_BY)
    parent = multiprocessing.parent_process()
    if started_by in (None, str(os.getpid())) or parent is None or parent.pid is None:
        return
    _starting = True  # for the processes that this one forks
    _end_with(parent.pid)


def _end_with(parent: int) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:  # no Linux
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it had ended before the request
        os.kill(os.getpid(), signal.SIGKILL)


def _before_fork() -> None:
    global _forked_by
    _forked_by = os.getpid()


def _after_fork() -> None:
    if _starting:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the command's handler is not for it
        _end_with(_forked_by)


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
