"""Folders and patterns -> the files in them. It follows links; an unreadable file is an error.

It does not follow a link back to a folder above, because everything there is listed already. It
skips hidden and temporary names without looking at them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from shards.errors import InputError
from teacher_dump.corpus.kinds import LOOP, OTHER, TABLE_LOGS, kind_of, why_skipped

_MAGIC = re.compile(r"[*?\[]")

FolderId = tuple[int, int]


def status_of(path: Path) -> os.stat_result | None:
    """The status of what a path stands for; None where there is nothing of that name.

    InputError for a broken link and for a path without permission.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            target = os.readlink(path)
            raise InputError(f"{path}: is a broken link to {target}") from None
        return None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError | ValueError) -> InputError:
    """The error for a file or folder that cannot be read."""
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return InputError(f"{path}: cannot be read ({reason})")


def is_pattern(path: Path) -> bool:
    """Whether a path has characters of a pattern in it."""
    return _MAGIC.search(str(path)) is not None


class Walk:
    """Lists files and remembers what it skips.

    `left_out` has the skipped paths by reason. No corpus may contain `out` or be inside it: a
    second run would read the first one's shards.
    """

    def __init__(self, out: Path | None) -> None:
        self.left_out: dict[str, list[Path]] = {}
        self._out = out
        self._out_real = None if out is None else Path(os.path.realpath(out))
        self._out_ids = set() if out is None else _ids_from(Path(os.path.realpath(out)))

    def leave_out(self, reason: str, path: Path) -> None:
        """Remember a file or folder that is not read."""
        self.left_out.setdefault(reason, []).append(path)

    def refuse_inside_out(self, path: Path) -> None:
        """InputError for a corpus file or folder inside `out`."""
        real = Path(os.path.realpath(path))
        if self._out_real is not None and real.is_relative_to(self._out_real):
            raise InputError(
                f"{path}: is inside --out {self._out}; give a folder outside the corpus"
            )

    def files_below(self, folder: Path, above: tuple[FolderId, ...] = ()) -> Iterator[Path]:
        """The files in a folder and in the folders below it."""
        status = status_of(folder)
        assert status is not None
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            self.leave_out(LOOP, folder)
            return
        if not above or folder.is_symlink():
            self._check_out(folder, identity)
        for entry in self._entries(folder):
            entry_status = self._status_of_entry(entry)
            if entry_status is None:
                continue
            if stat.S_ISDIR(entry_status.st_mode):
                yield from self.files_below(entry, (*above, identity))
            else:
                yield entry

    def files_of_pattern(self, pattern: Path) -> list[Path]:
        """The files that match a pattern, and those in the folders that match it, sorted."""
        parts = pattern.parts
        start = next(number for number, part in enumerate(parts) if _MAGIC.search(part))
        base = Path(*parts[:start])
        self._check_out_of_pattern(pattern, base, parts[start:])
        status = status_of(base)
        files: set[Path] = set()
        if status is not None and stat.S_ISDIR(status.st_mode):
            for match in self._matches(base, parts[start:], ()):
                match_status = self._status_of_entry(match)
                if match_status is not None and stat.S_ISDIR(match_status.st_mode):
                    files.update(self.files_below(match))
                elif match_status is not None:
                    files.add(match)
        if not files:
            raise InputError(f"{pattern}: no file matches this pattern (* ** ? [...])")
        return sorted(files)

    def _matches(
        self, folder: Path, parts: tuple[str, ...], above: tuple[FolderId, ...]
    ) -> Iterator[Path]:
        """Paths below a folder that match the parts of a pattern, as a shell expands them."""
        part, rest = parts[0], parts[1:]
        if part == "**":
            yield from self._matches(folder, rest or ("*",), above)
            yield from self._matches_below(folder, parts, above)
            return
        if not _MAGIC.search(part):
            paths = [folder / part] if status_of(folder / part) is not None else []
        else:
            names = self._entries(folder, hidden=part.startswith("."))
            paths = [entry for entry in names if fnmatchcase(entry.name, part)]
        for path in paths:
            if not rest:
                yield path
            elif path.is_dir():
                yield from self._matches(path, rest, ())

    def _matches_below(
        self, folder: Path, parts: tuple[str, ...], above: tuple[FolderId, ...]
    ) -> Iterator[Path]:
        status = folder.stat()
        above = (*above, (status.st_dev, status.st_ino))
        for entry in self._entries(folder):
            entry_status = self._status_of_entry(entry)
            if entry_status is None or not stat.S_ISDIR(entry_status.st_mode):
                continue
            if (entry_status.st_dev, entry_status.st_ino) not in above:
                yield from self._matches(entry, parts, above)

    def _entries(self, folder: Path, *, hidden: bool = False) -> list[Path]:
        """What is in a folder, sorted, without hidden and temporary names."""
        try:
            with os.scandir(folder) as listing:
                entries = sorted(Path(folder, entry.name) for entry in listing)
        except OSError as error:
            raise unreadable(folder, error) from error
        kept = []
        for entry in entries:
            if entry.name in TABLE_LOGS:
                raise InputError(
                    f"{entry}: {folder} is a {TABLE_LOGS[entry.name]} table, whose folder also"
                    " holds rows that were deleted or rewritten; export its current rows"
                )
            reason = why_skipped(entry.name)
            if reason is None or (hidden and entry.name.startswith(".")):
                kept.append(entry)
            else:
                self.leave_out(reason, entry)
        return kept

    def _status_of_entry(self, entry: Path) -> os.stat_result | None:
        """Status of a folder or regular file; None for one of another sort, which is not read."""
        status = status_of(entry)
        if status is None:
            raise InputError(f"{entry}: disappeared while the corpus was listed")
        if stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode):
            return status
        if kind_of(entry.name) is not None:
            raise not_regular(entry)
        self.leave_out(OTHER, entry)
        return None

    def _check_out(self, folder: Path, identity: FolderId) -> None:
        self.refuse_inside_out(folder)
        if identity in self._out_ids:
            raise self._out_in(f"the corpus folder {folder}")

    def _check_out_of_pattern(self, pattern: Path, base: Path, parts: Sequence[str]) -> None:
        real = Path(os.path.realpath(base))
        if self._out_real is None or not self._out_real.is_relative_to(real):
            return
        if _leads_to(self._out_real.relative_to(real).parts, parts):
            raise self._out_in(f"what the pattern {pattern} matches")

    def _out_in(self, what: str) -> InputError:
        return InputError(
            f"--out {self._out}: is inside {what}, where the next run would read it; give a folder"
            " outside the corpus"
        )


def not_regular(path: Path) -> InputError:
    """The error for a pipe, a socket or a device."""
    return InputError(
        f"{path}: expected a regular file, found a pipe or device (the run reads a corpus more than"
        " once)"
    )


def _leads_to(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether a pattern matches a folder above these names, them, or what may be below them."""
    if not parts or not names:
        return True
    if parts[0] == "**":
        return _leads_to(names, parts[1:]) or _leads_to(names[1:], parts)
    return fnmatchcase(names[0], parts[0]) and _leads_to(names[1:], parts[1:])


def _ids_from(path: Path) -> set[FolderId]:
    """The folder at a path and those above it, as far as they exist."""
    ids = set()
    for folder in (path, *path.parents):
        try:
            status = folder.stat()
        except OSError:
            continue
        ids.add((status.st_dev, status.st_ino))
    return ids
