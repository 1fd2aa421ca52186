"""One process at a time writes into a folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import InputError
from shards.files.durable import NOT_SUPPORTED

logger = logging.getLogger(__name__)

_held: set[int] = set()  # descriptors of this process


@contextmanager
def folder_lock(folder: Path, holder: str) -> Iterator[None]:
    """Make a folder if needed, and hold it until the end of the block or of the process.

    Forked children do not hold it. InputError if the folder cannot be made, or if another process
    holds it: "another `holder`".
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder}: another {holder} is writing to it") from error
        except OSError as error:
            if error.errno not in (*NOT_SUPPORTED, errno.ENOLCK):
                raise
            logger.warning(
                "warning: %s: its file system has no locks (%s); do not run two %s in this folder",
                folder, error.strerror, holder,
            )  # fmt: skip
        yield
    finally:
        if descriptor in _held:  # not in a forked child that leaves the block
            _held.remove(descriptor)
            os.close(descriptor)


def _drop() -> None:
    """Close the locks in a forked child: the lock lasts as long as any descriptor of it is open."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop)
