"""The dataset's tokenizer is data: written once, whole or not at all, and hashed.

Ids mean nothing without it, and every student is exported with it. The manifest has a SHA-256 of
each of its files, which is compared when a dataset is opened and when it is verified.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from shards import durable
from shards.errors import ShardCorruptError

TOKENIZER = "tokenizer"


def write_tokenizer(dataset: Path, save: Callable[[Path], object]) -> dict[str, str]:
    """Let `save` fill the folder `tokenizer` of a dataset, unless it is there; hashes of its files.

    Whatever `save` raises leaves nothing of it.
    """
    folder = dataset / TOKENIZER
    if not folder.is_dir():
        temporary = durable.temporary_name(folder)
        try:
            temporary.mkdir(parents=True)
            save(temporary)
            durable.sync_files(temporary)
            temporary.rename(folder)
            durable.sync_folder(dataset)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return hash_files(folder)


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by name."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not durable.is_temporary(path.name):
            with path.open("rb") as stream:
                found[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def check_tokenizer(dataset: Path, expected: Mapping[str, str]) -> None:
    """ShardCorruptError unless the files of a dataset's tokenizer are those of its manifest."""
    folder = dataset / TOKENIZER
    try:
        found = hash_files(folder)
    except OSError as error:
        raise _damaged(folder, f"cannot be read ({error.strerror})") from error
    for name, sha256 in expected.items():
        if name not in found:
            raise _damaged(folder / name, "missing")
        if found[name] != sha256:
            raise _damaged(folder / name, "not the file that the manifest has the hash of")


def _damaged(path: Path, text: str) -> ShardCorruptError:
    return ShardCorruptError(
        f"{path}: {text}; put a copy of it back, or delete the folder {TOKENIZER}, and the same"
        " dump-logits command writes it again"
    )
