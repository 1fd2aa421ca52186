"""Files that appear whole or not at all.

A file is written under a temporary name in the same folder, flushed to disk, and only then given
its name: by a hard link where nothing may be overwritten, by a rename where replacing is meant.
So a name that exists stands for a complete file, whatever was killed when. The price is one fsync
of the file and one of its folder each time.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """A fresh hidden name beside `path`; `is_temporary_name_of` recognises what a kill left."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def is_temporary_name_of(name: str, final_name: str) -> bool:
    """Whether `temporary_name` of a file called `final_name` may have given this name."""
    return name.startswith(f".{final_name}.") and name.endswith(".tmp")


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Give a file that is already flushed its final name. FileExistsError if the name is taken."""
    os.link(temporary, final)
    temporary.unlink()
    sync_folder(final.parent)


def write_flushed(path: Path, text: str) -> None:
    """Write a new file and flush it to disk; on failure nothing is left of it."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_new(path: Path, text: str) -> None:
    """Atomically create a text file. FileExistsError if there is one."""
    temporary = temporary_name(path)
    write_flushed(temporary, text)
    try:
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace(path: Path, text: str) -> None:
    """Atomically replace a text file."""
    temporary = temporary_name(path)
    write_flushed(temporary, text)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
