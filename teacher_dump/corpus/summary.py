"""What a run reads, and what it leaves out and why: for a person, and for the manifest."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teacher_dump.corpus.kinds import REASONS

logger = logging.getLogger(__name__)

_NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class FilesOfKind:
    """How many files of a kind there are, and their bytes together."""

    files: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Files and folders that are left out for one reason: their number and the first names."""

    reason: str
    files: int
    names: tuple[str, ...]

    @classmethod
    def of(cls, names_by_reason: Mapping[str, Sequence[str]]) -> list[LeftOut]:
        """In the order of a report."""
        return [
            cls(
                reason=reason,
                files=len(names_by_reason[reason]),
                names=tuple(sorted(names_by_reason[reason])[:_NAMES_SHOWN]),
            )
            for reason in REASONS
            if names_by_reason.get(reason)
        ]

    def text(self) -> str:
        """The names and the reason, for a person."""
        return f"{_names(self.names, self.files)} ({self.reason})"


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """The files of a corpus by kind, and what a listing found beside them.

    `cards_read` are the files named like a dataset card or a licence that are read as documents,
    `splits_read` those named like a validation or test split that are read with others.
    """

    kinds: Mapping[str, FilesOfKind]
    left_out: Sequence[LeftOut]
    cards_read: tuple[str, ...] = ()
    splits_read: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        sizes: Sequence[tuple[str, int]],
        left_out: Mapping[str, Sequence[str]],
        cards_read: Sequence[str],
        splits_read: Sequence[str] = (),
    ) -> CorpusSummary:
        """From the kind and bytes of every file, and names by the reason for leaving them out."""
        groups: dict[str, list[int]] = {}
        for kind, num_bytes in sizes:
            groups.setdefault(kind, []).append(num_bytes)
        return cls(
            kinds={kind: FilesOfKind(files=len(of), bytes=sum(of)) for kind, of in groups.items()},
            left_out=LeftOut.of(left_out),
            cards_read=tuple(cards_read),
            splits_read=tuple(splits_read),
        )

    def lines(self) -> list[str]:
        """A short block for a person: a label of 15 characters, then what there is."""
        kinds = "; ".join(
            f"{kind}: {of.files:,} file{'' if of.files == 1 else 's'}, {size_text(of.bytes)}"
            for kind, of in self.kinds.items()
        )
        lines = [f"corpus         {kinds}"]
        if self.cards_read:
            lines.append(f"documents too  {_names(self.cards_read, len(self.cards_read))}")
        if self.splits_read:
            names = _names(self.splits_read, len(self.splits_read))
            lines.append(f"read too       {names} (named like a validation or test split)")
        return lines + [f"left out       {of.text()}" for of in self.left_out]

    def log(self) -> None:
        """Log the lines."""
        for line in self.lines():
            logger.info("%s", line)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "kinds": {
                kind: {"files": of.files, "bytes": of.bytes} for kind, of in self.kinds.items()
            },
            "left_out": {
                of.reason: {"files": of.files, "names": list(of.names)} for of in self.left_out
            },
        }


def size_text(num_bytes: float) -> str:
    """`1.23 GB`, `45.6 MB`, `789 bytes`."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def _names(names: Sequence[str], num_files: int) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = num_files - min(len(names), _NAMES_SHOWN)
    return f"{shown} and {more:,} more" if more else shown
