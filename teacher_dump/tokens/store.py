"""Flat token arrays on disk, made once per dataset, with access in O(1).

A text corpus has no random access, and a resumed pass or a repaired shard must not tokenise it from
the start. So each split (`train`, `validation`) becomes two flat files: its tokens (uint16, or
uint32 above 65,536 ids) with every document closed by the end-of-document token, and the int64
position at which each document starts. Whole documents are held out, by a hash of their text and
the seed: no document is in both splits, and the same text always falls on the same side.

A corpus with a label mask has a third file, a byte per token. The builder writes `store.json` last;
only with it a store is complete (`open_store.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import RunError
from shards.files.sealed import unseal
from teacher_dump.tokens.sequences import SplitSequences, cut

STORE_NAME, PROGRESS_NAME = "store.json", "progress.json"

Report = Callable[[int, int], None]


class TokenStore:
    """A finished store, memory-mapped. `sha256` covers tokens and document borders."""

    def __init__(self, folder: Path) -> None:
        content = unseal(folder / STORE_NAME)
        self.folder = folder
        self.sha256 = str(content["sha256"])
        self._dtype = np.dtype(str(content["dtype"]))
        self._has_mask = bool(content.get("has_mask", False))
        self._sizes: Any = content["splits"]

    def sequences(
        self,
        split: str,
        sequence_length: int,
        *,
        joined: bool = True,
        bos_token_id: int | None = None,
    ) -> SplitSequences:
        """The split cut into sequences; RunError if a file is not as long as recorded."""
        sizes = self._sizes[split]
        columns = {
            column.name: _map(column.path(self.folder, split), column.dtype, sizes[column.counts])
            for column in columns_of(self._dtype, self._has_mask)
        }
        return cut(
            joined=joined,
            bos_token_id=bos_token_id,
            split=split,
            tokens=columns["tokens"],
            document_starts=columns["documents"],
            label_mask=columns.get("mask"),
            sequence_length=sequence_length,
        )


@dataclass(frozen=True)
class Column:
    """A flat file of a split: its name, its type, and what it has one item for."""

    name: str
    dtype: np.dtype[Any]
    counts: str

    def path(self, folder: Path, split: str) -> Path:
        """The file of a split."""
        return folder / f"{split}.{self.name}"


def columns_of(dtype: np.dtype[Any], has_mask: bool) -> list[Column]:
    """The files that a split of a store has."""
    mask = [Column("mask", np.dtype(np.bool_), "tokens")] if has_mask else []
    return [Column("tokens", dtype, "tokens"), Column("documents", np.dtype(np.int64), "documents"),
            *mask]  # fmt: skip


def _map(path: Path, dtype: np.dtype[Any], count: int) -> Any:
    num_bytes = path.stat().st_size if path.exists() else 0
    if num_bytes != count * dtype.itemsize:
        raise RunError(
            f"{path}: has {num_bytes} bytes, expected {count * dtype.itemsize}; delete the folder"
            f" {path.parent}, and the same command makes it again"
        )
    return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype=dtype)
