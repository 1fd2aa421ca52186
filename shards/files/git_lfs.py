"""Git LFS pointers: the short text that stands for a large file until `git lfs pull` fetches it."""

from __future__ import annotations

from pathlib import Path

from shards.errors import InputError

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path) -> None:
    """InputError for a file that is a pointer; OSError if the file cannot be read."""
    with path.open("rb") as stream:
        if stream.read(len(_BEGINNING)) == _BEGINNING:
            raise InputError(
                f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
            )
