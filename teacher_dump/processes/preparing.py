"""Rank 0 prepares a dataset, the other ranks wait for it and see how far it is.

The sign of life is a file in the dataset's folder that rank 0 writes anew every few seconds. A
waiting rank compares what it reads with what it read before, on its own clock, so clocks of other
machines do not matter. Rank 0 need not have started yet: ranks start in any order.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from shards.errors import RunError
from shards.files import durable
from shards.process.progress import ProgressLine

PREPARING_NAME = "preparing.json"

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds: how often a rank looks, and how long it waits without a new sign of rank 0.

    Network file systems show another machine's file up to a minute late.
    """

    look_every: float = 2.0
    sign_every: float = 5.0
    first_sign: float = 600.0
    next_sign: float = 150.0


class SignOfLife:
    """What rank 0 shows while it prepares; `text` may be set at any time, from any thread."""

    def __init__(self) -> None:
        self.text = "preparing"


@contextmanager
def sign_of_life(folder: Path, patience: Patience | None = None) -> Iterator[SignOfLife]:
    """Write the sign every few seconds until the end of the block, then remove it."""
    every = (patience or Patience()).sign_every
    path = folder / PREPARING_NAME
    sign, stopped = SignOfLife(), threading.Event()

    def show() -> None:
        number = 0
        while True:
            # Other writes report a full disk; this is only a sign.
            with contextlib.suppress(OSError):
                durable.replace(path, json.dumps([socket.gethostname(), os.getpid(), number,
                                                  sign.text]))  # fmt: skip
            number += 1
            if stopped.wait(every):
                return

    thread = threading.Thread(target=show, name="sign-of-life", daemon=True)
    thread.start()
    try:
        yield sign
    finally:
        stopped.set()
        thread.join()
        durable.discard(path)


def wait_for(folder: Path, look: Callable[[], _T | None], patience: Patience | None = None) -> _T:
    """The first thing that `look` finds; RunError when rank 0 gives no sign of life any more."""
    waits = patience or Patience()
    line = ProgressLine()
    last = _read(folder / PREPARING_NAME)  # a killed rank 0 may have left it
    is_alive = False
    changed_at = time.monotonic()
    try:
        while (result := look()) is None:
            sign = _read(folder / PREPARING_NAME)
            if sign is not None and sign != last:
                last, is_alive, changed_at = sign, True, time.monotonic()
            limit = waits.next_sign if is_alive else waits.first_sign
            if time.monotonic() - changed_at > limit:
                raise RunError(_nobody(folder, last, limit))
            if line.due():
                line.show(f"waiting for rank 0: {'no sign yet' if last is None else last[1]}")
            time.sleep(waits.look_every)
    finally:
        line.clear()
    return result


def _nobody(folder: Path, last: tuple[str, str] | None, limit: float) -> str:
    what = (
        f"rank 0 did not start within {limit:.0f} s"
        if last is None
        else f"rank 0 has given no sign for {limit:.0f} s (it was at: {last[1]})"
    )
    return (
        f"{folder}: {what}, and no other process makes the dataset's manifest; start rank 0 or"
        " dump-logits --prepare, then run this command again"
    )


def _read(path: Path) -> tuple[str, str] | None:
    """(what tells this sign from others, its text); None without a whole sign."""
    try:
        content = path.read_text(encoding="utf-8")
        return content, str(json.loads(content)[-1])
    except (OSError, ValueError, LookupError, TypeError):
        return None
