"""Which corpus a token store was made from, by content: files may be renamed and moved.

A file's fingerprint is its kind, its weight and the hash of its bytes, without its name. The record
also has time and inode, so that an unchanged file is not hashed again. If files were renamed, their
order is that of the record, so that an unfinished store continues as it began.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.errors import IdentityMismatchError
from shards.files.checksums import path_sha256
from shards.files.json_text import json_differences
from teacher_dump.corpus.listing import CorpusFile
from teacher_dump.tokens.store import Report

logger = logging.getLogger(__name__)

Fingerprint = Mapping[str, Any]  # kind, weight, parts: bytes, modified_ns, inode, sha256 each

_NAMED = 3  # files that an error names


def take_fingerprints(
    files: Sequence[CorpusFile], recorded: Sequence[Fingerprint], hashed: Report
) -> list[Fingerprint]:
    """One per file; what `recorded` has of an unchanged file is not hashed again.

    `hashed(done_bytes, of_bytes)` is called after every file that had to be.
    """
    known = {_unchanged(part): part["sha256"] for entry in recorded for part in entry["parts"]}
    of_bytes = sum(path.stat().st_size for file in files for path in file.paths)
    done_bytes = 0
    prints: list[Fingerprint] = []
    for file in files:
        parts = []
        for path in file.paths:
            status = path.stat()
            part: dict[str, Any] = {
                "bytes": status.st_size,
                "modified_ns": status.st_mtime_ns,
                "inode": status.st_ino,
            }
            sha256 = known.get(_unchanged(part))
            parts.append({**part, "sha256": sha256 or path_sha256(path)})
            done_bytes += status.st_size
            if sha256 is None:
                hashed(done_bytes, of_bytes)
        prints.append({"kind": str(file.kind), "weight": file.weight, "parts": parts})
    _warn_of_copies(files, prints)
    return prints


def refuse_other_rules(folder: Path, rules: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """IdentityMismatchError for tokens that were made under other rules."""
    different = json_differences({"tokens": rules}, {"tokens": recorded})
    if different:
        raise IdentityMismatchError(
            f"{folder}: made with other options: {'; '.join(different[:5])}; give another --out, or"
            " the old options"
        )


def order_as_recorded(
    folder: Path,
    files: Sequence[CorpusFile],
    prints: Sequence[Fingerprint],
    recorded: Sequence[Fingerprint],
) -> list[int]:
    """The places of the recorded files among these; IdentityMismatchError for another corpus."""
    places: dict[tuple[Any, ...], deque[int]] = defaultdict(deque)
    for number, entry in enumerate(prints):
        places[_identity(entry)].append(number)
    order: list[int] = []
    gone: list[Fingerprint] = []
    for entry in recorded:
        same = places[_identity(entry)]
        if same:
            order.append(same.popleft())
        else:
            gone.append(entry)
    others = sorted(number for numbers in places.values() for number in numbers)
    if gone or others:
        reasons = [f"{files[n].path}: {_difference(prints[n], gone)}" for n in others[:_NAMED]]
        if len(others) > _NAMED:
            reasons.append(f"and {len(others) - _NAMED:,} more files")
        if len(gone) > len(others):
            reasons.append(f"missing files: {len(gone) - len(others):,}")
        raise IdentityMismatchError(
            f"{folder}: made from another corpus: {'; '.join(reasons)}; give another --out, or the"
            " old corpus"
        )
    return order


def _unchanged(part: Mapping[str, Any]) -> tuple[Any, ...]:
    return part["bytes"], part["modified_ns"], part["inode"]


def _identity(entry: Fingerprint) -> tuple[Any, ...]:
    return entry["kind"], entry["weight"], *(part["sha256"] for part in entry["parts"])


def _difference(entry: Fingerprint, gone: Sequence[Fingerprint]) -> str:
    """How a file differs from what was read before."""
    for other in gone:
        if _identity(other)[2:] == _identity(entry)[2:]:
            changed = [key for key in ("weight", "kind") if other[key] != entry[key]]
            return ", ".join(f"{key} {entry[key]}, was {other[key]}" for key in changed)
    return "its content changed" if gone else "it is new"


def _warn_of_copies(files: Sequence[CorpusFile], prints: Sequence[Fingerprint]) -> None:
    first: dict[str, Path] = {}
    for file, entry in zip(files, prints, strict=True):
        part = entry["parts"][0]
        other = first.setdefault(part["sha256"], file.path)
        if other is not file.path and part["bytes"]:
            logger.warning(
                "warning: %s: has the same content as %s; the run reads both", file.path, other
            )
