"""The token store of a corpus: opened if it is there, made or continued if not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.files.sealed import unseal
from teacher_dump.corpus.listing import CorpusFile
from teacher_dump.corpus.rules import TokenisingRules
from teacher_dump.tokens.builder import TokenBuilder
from teacher_dump.tokens.fingerprints import (
    Fingerprint,
    order_as_recorded,
    refuse_other_rules,
    take_fingerprints,
)
from teacher_dump.tokens.store import PROGRESS_NAME, STORE_NAME, Report, TokenStore


def open_store(folder: Path, files: Sequence[CorpusFile], rules: TokenisingRules) -> TokenStore:
    """The store of this corpus under these rules, which is whole.

    Raises FileNotFoundError if there is none, IdentityMismatchError if the folder holds another.
    """
    made_from = unseal(folder / STORE_NAME)["made_from"]
    _in_order(folder, files, rules, made_from, lambda done_bytes, of_bytes: None)
    return TokenStore(folder)


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
    holds another store, InputError for a corpus without text or with a bad record.
    """
    files, prints = _in_order(folder, files, rules, _recorded(folder), hashed)
    if not (folder / STORE_NAME).exists():
        made_from: dict[str, Any] = {"rules": rules.to_json(), "files": prints}
        folder.mkdir(parents=True, exist_ok=True)
        TokenBuilder(folder, files, tokenizer, rules, made_from).build(report)
    return TokenStore(folder)


def _in_order(
    folder: Path,
    files: Sequence[CorpusFile],
    rules: TokenisingRules,
    recorded: Any,
    hashed: Report,
) -> tuple[Sequence[CorpusFile], Sequence[Fingerprint]]:
    """The files and their fingerprints in the order of what is recorded; None: in their own.

    IdentityMismatchError if another corpus or other rules are recorded.
    """
    if recorded is None:
        return files, take_fingerprints(files, [], hashed)
    refuse_other_rules(folder, rules.to_json(), recorded["rules"])
    prints = take_fingerprints(files, recorded["files"], hashed)
    order = order_as_recorded(folder, files, prints, recorded["files"])
    return [files[n] for n in order], [prints[n] for n in order]


def _recorded(folder: Path) -> Any:
    """What the store in a folder was made from, or is being made from; None without one."""
    for name in (STORE_NAME, PROGRESS_NAME):
        if (folder / name).exists():
            return unseal(folder / name)["made_from"]
    return None
