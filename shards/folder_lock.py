"""One process at a time writes into a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import InputError


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
        yield
    finally:
        os.close(descriptor)
