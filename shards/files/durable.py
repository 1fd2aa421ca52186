"""Files that appear whole or not at all.

A writer writes a file under a temporary name in the same folder and flushes it to disk. Only then
it gives the file its name: by a hard link if nothing may be overwritten, by a rename to replace a
file. So an existing name always stands for a complete file, even after a kill. Each file costs one
fsync, and one of its folder.

A temporary file belongs to the process that made it, which may run on another machine. Another
process removes it only when it is older than a day.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import time
from functools import cache
from pathlib import Path

from shards.errors import InputError

logger = logging.getLogger(__name__)

# Errors of a file system that does not support a call.
NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
OLD_AFTER_S = 86_400.0
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def temporary_name(path: Path) -> Path:
    """A fresh hidden name beside `path`; `is_temporary` recognises what a kill left."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def is_temporary(name: str) -> bool:
    """Whether `temporary_name` may have given this name."""
    return _TEMPORARY.fullmatch(name) is not None


def discard(*paths: Path) -> None:
    """Remove files that this process made, as far as the disk lets it.

    This often follows an error, which is the one to report: a disk that became read-only refuses
    to remove files, too.
    """
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def remove_old_temporaries(folder: Path, older_than_s: float = OLD_AFTER_S) -> None:
    """Remove what killed processes left in a folder, as far as possible, once it is a day old."""
    now = time.time()
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            # Most names of a large folder end here.
            if not entry.name.startswith(".") or not is_temporary(entry.name):
                continue
            with contextlib.suppress(OSError):
                if now - entry.stat().st_mtime < older_than_s:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, where the file system can do that for a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        _warn_once(f"{folder}: its file system does not flush folders; a power cut may lose names")
    finally:
        os.close(descriptor)


def check_links(folder: Path) -> None:
    """InputError for a folder whose file system has no hard links, which publishing needs."""
    temporary = temporary_name(folder / "links")
    linked = temporary_name(folder / "links")
    try:
        temporary.touch()
        os.link(temporary, linked)
    except OSError as error:
        if error.errno not in (*NOT_SUPPORTED, errno.EPERM, errno.EMLINK):
            raise
        raise InputError(
            f"{folder}: its file system has no hard links ({error.strerror}), which keep a new file"
            " from overwriting another; give a folder on another file system"
        ) from error
    finally:
        discard(temporary, linked)


@cache
def _warn_once(text: str) -> None:
    logger.warning("warning: %s", text)


def sync_files(folder: Path) -> None:
    """Flush every file below a folder, and the folder itself, to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def publish(temporary: Path, final: Path) -> None:
    """Give a flushed file its final name too. FileExistsError if that name is taken.

    The temporary name stays. Calling it again after it succeeded does nothing.
    """
    try:
        os.link(temporary, final)
    except FileExistsError:
        # Over NFS a repeated request can fail after it has succeeded.
        if not os.path.samefile(temporary, final):
            raise
    sync_folder(final.parent)


def write_flushed(path: Path, text: str) -> None:
    """Write a new file and flush it to disk; on failure, remove it."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        discard(path)
        raise


def write_new(path: Path, text: str) -> None:
    """Atomically create a text file. FileExistsError if there is one."""
    temporary = temporary_name(path)
    write_flushed(temporary, text)
    try:
        publish(temporary, path)
    finally:
        discard(temporary)


def replace(path: Path, text: str) -> None:
    """Atomically replace a text file."""
    temporary = temporary_name(path)
    write_flushed(temporary, text)
    try:
        temporary.replace(path)
    except BaseException:
        discard(temporary)
        raise
    sync_folder(path.parent)
