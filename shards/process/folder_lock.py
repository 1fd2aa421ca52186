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


@contextmanager
def folder_lock(folder: Path, holder: str) -> Iterator[None]:
    """Make a folder if it is not there, and hold it until the end of the block or of the process.

    InputError if it cannot be made, or if another process holds it: "another `holder`".
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
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
        os.close(descriptor)
