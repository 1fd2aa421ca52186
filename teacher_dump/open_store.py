"""The token store of a corpus: opened if it is there, made or continued if not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.identity import Json
from shards.sealed import unseal
from teacher_dump.corpus import file_sha256
from teacher_dump.corpus_listing import CorpusFile
from teacher_dump.rules import TokenisingRules
from teacher_dump.token_builder import TokenBuilder
from teacher_dump.token_store import PROGRESS_NAME, STORE_NAME, Report, TokenStore, refuse_other


def open_or_build(
    folder: Path,
    files: Sequence[CorpusFile],
    tokenizer: Any,
    rules: TokenisingRules,
    report: Report,
    hashed: Report = lambda done_bytes, of_bytes: None,
) -> TokenStore:
    """The store of this corpus under these rules: opened, continued after a kill, or made.

    `report(documents, tokens)` is called now and then, and `hashed(done_bytes, of_bytes)` after
    every file that had to be hashed. Raises IdentityMismatchError if the folder
    holds a store of something else, InputError for a corpus without text or with a bad record.
    """
    made_from = {"rules": rules.to_json(), "files": _fingerprints(files, folder, hashed)}
    if (folder / STORE_NAME).exists():
        refuse_other(folder, made_from, unseal(folder / STORE_NAME)["made_from"])
        return TokenStore(folder)
    folder.mkdir(parents=True, exist_ok=True)
    TokenBuilder(folder, files, tokenizer, rules, made_from).build(report)
    return TokenStore(folder)


def _fingerprints(files: Sequence[CorpusFile], folder: Path, hashed: Report) -> dict[str, Json]:
    """Per file: bytes, time and content hash; the hash of an unchanged file is not made again."""
    known: Any = {}
    for name in (STORE_NAME, PROGRESS_NAME):
        if (folder / name).exists():
            known = unseal(folder / name)["made_from"]
            known = known["files"]
            break
    prints: dict[str, Json] = {}
    done_bytes = 0
    of_bytes = sum(path.stat().st_size for file in files for path in file.paths)
    for number, file in enumerate(files):
        weight = {} if file.weight == 1 else {"weight": file.weight}
        for path in file.paths:
            status = path.stat()
            key = f"{number} {file.name}" + ("" if path == file.path else path.suffix)
            old = known.get(key, {})
            unchanged = [old.get("bytes"), old.get("modified_ns")] == [
                status.st_size,
                status.st_mtime_ns,
            ]
            prints[key] = {
                "bytes": status.st_size,
                "modified_ns": status.st_mtime_ns,
                "sha256": old["sha256"] if unchanged else file_sha256(path),
                **weight,
            }
            done_bytes += status.st_size
            if not unchanged:
                hashed(done_bytes, of_bytes)
    return prints
