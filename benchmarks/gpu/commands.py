"""Commands of the project in processes of their own, and `kill -9` of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu.check import ROOT, CheckFailedError, expect

# Whatever a command starts inherits it.
_MARK = "LOGITSHARDS_CHECK"
_POLL_S = 0.005
_ENDING_S = 30.0


def run(*words: str) -> str:
    """What a command of `cli.py` prints. CheckFailedError with its last line if it fails."""
    process = _start(words, str(uuid.uuid4()))
    output, errors = process.communicate()
    _print(errors)
    last = (errors.strip().splitlines() or [""])[-1]
    expect(process.returncode == 0, f"{words[0]} ended with {process.returncode}: {last}")
    return output


def kill_when(reached: Callable[[], bool], *words: str) -> list[int]:
    """Kill a command as soon as something is true; the processes of its own that do not end.

    CheckFailedError if the command ends before.
    """
    mark = str(uuid.uuid4())
    process = _start(words, mark)
    try:
        while not reached():
            if process.poll() is not None:
                _, errors = process.communicate()
                _print(errors)
                raise CheckFailedError(
                    f"{words[0]} ended with {process.returncode} before it was killed"
                )
            time.sleep(_POLL_S)
    finally:
        process.kill()
    process.wait()
    until = time.monotonic() + _ENDING_S
    while (left := _marked(mark)) and time.monotonic() < until:
        time.sleep(_POLL_S)
    return left


def _start(words: Sequence[str], mark: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, _MARK: mark},
        text=True,
    )


def _print(errors: str) -> None:
    sys.stderr.write(errors)


def _marked(mark: str) -> list[int]:
    """Processes that run with a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:  # it has ended, or is somebody else's
            continue
        if f"{_MARK}={mark}".encode() in environment:
            found.append(int(folder.name))
    return found
