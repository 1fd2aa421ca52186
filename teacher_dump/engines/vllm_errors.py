"""Why vLLM did not start or stopped: the error of the process in which it happened, in one line.

vLLM runs the teacher in other processes. If one fails, the error here only says that the cause
stands in another process's log. So the errors that these log are collected in a file that has no
name and that they write through the process that started them.
"""

from __future__ import annotations

import logging
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from shards.errors import InputError

# The file, in the environment of the processes that an engine starts.
_PATH = "LOGITSHARDS_ENGINE_ERRORS"
# What the errors here say where those of other processes are meant.
_ELSEWHERE = "root cause"
_MOST_BYTES = 1 << 16  # of one error's line

_MORE_MEMORY = (
    "the teacher needs more memory than there is: --tensor-parallel, a shorter --sequence-length or"
    " --engine-arg max_num_batched_tokens"
)
_OTHERS = "other programs hold the memory: end them, or --engine-arg gpu_memory_utilization"
# Parts of vLLM's messages for which no other engine is a remedy -> what is.
REMEDIES = {
    "Free memory on device": _OTHERS,
    "Available memory on node": _OTHERS,
    "No available memory for the cache blocks": _MORE_MEMORY,
    "To serve at least one request": _MORE_MEMORY,
    "out of memory": _MORE_MEMORY,
    "can't allocate memory": _MORE_MEMORY,
    "divisible by": "another --tensor-parallel may fit this teacher",
    "local world size": "VLLM_CPU_OMP_THREADS_BIND needs a list of cores for each process, as 0|1",
}


class ErrorLog:
    """The errors that processes of vLLM's engine have logged."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile() as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """A context in which this process starts the others; vLLM must be imported."""
        handler = _Handler(self._path)
        logging.getLogger("vllm").addHandler(handler)  # forked processes have it, too
        os.environ[_PATH] = self._path
        try:
            yield
        finally:
            logging.getLogger("vllm").removeHandler(handler)
            del os.environ[_PATH]

    def cause_of(self, error: Exception) -> str:
        """What an error says, or the first of another process if it says that the cause is there.

        One line, with the name of its class where it says nothing.
        """
        text = last_line(error)
        if str(error).strip() and _ELSEWHERE not in str(error):
            return text
        logged = os.pread(self._descriptor, _MOST_BYTES, 0).decode(errors="replace")
        return logged.partition("\n")[0] or text


def collect_errors() -> None:
    """In a process that an engine of ours has spawned: write its errors to the file of that."""
    path = os.environ.get(_PATH)
    logger = logging.getLogger("vllm")
    if path is not None and not any(isinstance(h, _Handler) for h in logger.handlers):
        logger.addHandler(_Handler(path))


class _Handler(logging.Handler):
    """Appends the errors of vLLM's engine, one line each."""

    def __init__(self, path: str) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        # not those of plugins and of optional packages, without which an engine may go on
        if not isinstance(error, Exception) or not record.name.startswith("vllm.v1."):
            return
        with suppress(OSError), open(self._path, "a", encoding="utf-8") as file:
            file.write(last_line(error) + "\n")


def not_started(architecture: str, cause: str, fallback: str) -> InputError:
    """The error for a vLLM that does not start: with a remedy, or the engine to use instead."""
    for part, remedy in REMEDIES.items():
        if part in cause:
            return InputError(f"vLLM does not start: {cause} ({remedy})")
    return InputError(
        f"vLLM does not start with this teacher ({architecture}): {cause}"
        f" (--debug shows all; {fallback} is the fallback)"
    )


def last_line(error: Exception) -> str:
    """What an error says; vLLM puts a traceback before it, pydantic its input and a link behind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("For further information")]
    last = lines[-1] if lines else type(error).__name__
    return last.split(" [type=")[0].removeprefix("Value error, ").rstrip(".")
