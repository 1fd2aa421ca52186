"""Runs checks one after the other within a time budget, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.check import ROOT, Check, Figures
from benchmarks.gpu.child import RESULT

_LEAST_S = 15.0  # with less time left a check is not started


def run_checks(
    checks: Sequence[Check], *, small: bool, budget_s: float
) -> Iterator[tuple[Check, Figures]]:
    """Each check and its result, as soon as it has one.

    A result has `status` and `seconds`, and with "ok" `figures`, with "failed" `error`, with "left
    out" and "not run" `reason`. A check that uses up its share of the budget has failed; one that
    the end of the budget cuts off was not run.
    """
    ends = time.monotonic() + budget_s
    for check in checks:
        started = time.monotonic()
        left_s = ends - started
        if left_s < _LEAST_S:
            yield check, _not_run(f"{max(0.0, left_s):.0f} s of {budget_s:.0f} were left")
            continue
        limit_s = check.share * budget_s
        result = _run(check, small, min(limit_s, left_s))
        seconds = time.monotonic() - started
        if result is None and left_s < limit_s:
            result = _not_run(f"cut off after {seconds:.0f} s by the end of the budget")
        elif result is None:
            result = {"status": "failed", "error": f"did not end within {limit_s:.0f} s"}
        yield check, {**result, "seconds": round(seconds, 1)}


def _not_run(reason: str) -> Figures:
    return {"status": "not run", "reason": reason, "seconds": 0.0}


def _run(check: Check, small: bool, limit_s: float) -> Figures | None:
    """The result of a check; None if it did not end in time."""
    with tempfile.TemporaryDirectory(prefix=f"{check.name}-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        command = [sys.executable, "-m", "benchmarks.gpu.child", check.name, str(folder)]
        # Standard output belongs to the result of all checks.
        process = subprocess.Popen(
            [*command, *(["--small"] if small else [])],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill_group(process)
        file = folder / RESULT
        if not file.is_file():
            return {"status": "failed", "error": f"its process ended with {process.returncode}"}
        result: Figures = json.loads(file.read_text(encoding="utf-8"))
        return result


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
