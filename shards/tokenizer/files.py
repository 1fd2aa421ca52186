"""The dataset's copy of the tokenizer: written once, whole or not at all, and hashed.

Ids mean nothing without it, and every exported student contains it. The manifest has a SHA-256 of
each of its files. Opening and verifying a dataset compare these.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from shards.errors import ShardCorruptError, one_line
from shards.files import durable
from shards.files.checksums import path_sha256
from shards.tokenizer.content import TOKENIZER_NAME, tokenizer_sha256

TOKENIZER = "tokenizer"


def write_tokenizer(dataset: Path, files: Mapping[str, str]) -> None:
    """Make the folder `tokenizer` of a dataset hold exactly these files, name -> text.

    A folder that already does stays; another one is replaced. On OSError the old one stays.
    """
    folder = dataset / TOKENIZER
    if folder.is_dir() and hash_files(folder) == hash_texts(files):
        return
    temporary, old = durable.temporary_name(folder), durable.temporary_name(folder)
    try:
        temporary.mkdir(parents=True)
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        durable.sync_files(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        durable.sync_folder(dataset)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def hash_texts(files: Mapping[str, str]) -> dict[str, str]:
    """What `hash_files` says of a folder with these files."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by name."""
    return {
        path.name: path_sha256(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and not durable.is_temporary(path.name)
    }


def check_tokenizer(dataset: Path, expected: Mapping[str, str]) -> None:
    """ShardCorruptError unless the files of a dataset's tokenizer are those of its manifest."""
    folder = dataset / TOKENIZER
    try:
        hashes = hash_files(folder)
    except OSError as error:
        raise _damaged(folder, f"cannot be read ({error.strerror})") from error
    for name, sha256 in expected.items():
        if name not in hashes:
            raise _damaged(folder / name, "missing")
        if hashes[name] != sha256:
            raise _damaged(folder / name, "does not match its hash in the manifest")


def check_content(dataset: Path, sha256: str) -> None:
    """ShardCorruptError for a tokenizer.json that maps text to other ids than the dataset's."""
    file = dataset / TOKENIZER / TOKENIZER_NAME
    if not file.is_file():
        return  # `check_tokenizer` says what is missing
    try:
        file_sha256 = tokenizer_sha256(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(file, f"cannot be read ({one_line(error)})") from error
    if file_sha256 != sha256:
        raise _damaged(
            file, f"is another tokenizer ({file_sha256[:12]}) than the dataset's ({sha256[:12]})"
        )


def _damaged(path: Path, text: str) -> ShardCorruptError:
    return ShardCorruptError(
        f"{path}: {text}; put a copy of it back, or delete the folder {TOKENIZER}, and the same"
        " command writes it again"
    )
