"""The token store of a corpus: opened if it is there, made or continued if not."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.files.sealed import unseal
from teacher_dump.corpus.listing import CorpusFile
from teacher_dump.corpus.rules import TokenisingRules
from teacher_dump.tokens.builder import TokenBuilder
from teacher_dump.tokens.fingerprints import (
    order_as_recorded,
    refuse_other_rules,
    take_fingerprints,
)
from teacher_dump.tokens.store import PROGRESS_NAME, STORE_NAME, Report, TokenStore


def open_or_build(
    folder: Path,
    files: Sequence[CorpusFile],
    tokenizer: Any,
    rules: TokenisingRules,
    report: Report | None,
    hashed: Report = lambda done_bytes, of_bytes: None,
) -> TokenStore:
    """The store of this corpus under these rules: opened, continued after a kill, or made.

    `report(documents, tokens)` is called now and then; None makes nothing, and without a store
    raises FileNotFoundError. `hashed(done_bytes, of_bytes)` is called after every file that had to
    be hashed. Raises IdentityMismatchError if the folder holds another store, InputError for a
    corpus without text or with a bad record.
    """
    if report is None and not (folder / STORE_NAME).exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / STORE_NAME))
    recorded = _recorded(folder)
    if recorded is not None:
        refuse_other_rules(folder, rules.to_json(), recorded["rules"])
    prints = take_fingerprints(files, [] if recorded is None else recorded["files"], hashed)
    if recorded is not None:
        order = order_as_recorded(folder, files, prints, recorded["files"])
        files, prints = [files[n] for n in order], [prints[n] for n in order]
    if report is not None and not (folder / STORE_NAME).exists():
        made_from: dict[str, Any] = {"rules": rules.to_json(), "files": prints}
        folder.mkdir(parents=True, exist_ok=True)
        TokenBuilder(folder, files, tokenizer, rules, made_from).build(report)
    return TokenStore(folder)


def _recorded(folder: Path) -> Any:
    """What the store in a folder was made from, or is being made from; None without one."""
    for name in (STORE_NAME, PROGRESS_NAME):
        if (folder / name).exists():
            return unseal(folder / name)["made_from"]
    return None
