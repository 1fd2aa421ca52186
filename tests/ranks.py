"""Processes as torchrun starts them: with their rank, and where they meet."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from typing import Any

from tests.forked import FORKED

TIMEOUT_S = 300


def start_ranks(
    function: Callable[..., None], size: int, *arguments: Any
) -> list[ForkServerProcess]:
    """Processes that call `function(*arguments)`, with the variables of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        FORKED.Process(target=_run, args=(function, rank, size, port, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes: Sequence[ForkServerProcess]) -> list[int | None]:
    """The exit codes of processes, once all have ended."""
    for process in processes:
        process.join(TIMEOUT_S)
    return [process.exitcode for process in processes]


def run_ranks(function: Callable[..., None], size: int, *arguments: Any) -> None:
    """Call a function in that many processes, of which none fails."""
    assert exit_codes(start_ranks(function, size, *arguments)) == [0] * size


def _run(
    function: Callable[..., None], rank: int, size: int, port: int, arguments: Sequence[Any]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    function(*arguments)
