"""List the files that `--corpus` names, in reading order, with a summary for the user.

`--corpus` is a file, a folder, or a pattern if nothing of that name exists. A folder stands for the
corpus files below it, sorted by path. A file that would be read twice, cannot be read or is not
what its name says is an error, before the run writes anything.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import InputError
from teacher_dump.corpus.choosing import Chosen, select
from teacher_dump.corpus.kinds import EXPECTED, Kind, compression_of, is_index, kind_of
from teacher_dump.corpus.summary import CorpusSummary
from teacher_dump.corpus.token_files import index_of
from teacher_dump.corpus.walk import Walk, is_pattern, not_regular, status_of, unreadable

# Small files that stand for a large one that was not downloaded: how they begin, what fetches it.
_POINTERS = {
    b"version https://git-lfs.github.com/spec/": ("a Git LFS pointer", "git lfs pull"),
    b"version https://hawser.github.com/spec/": ("a Git LFS pointer", "git lfs pull"),
    b"/annex/objects/": ("a git-annex pointer", "git annex get"),
}
_LARGEST_POINTER_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """One file of the corpus; `name` is relative to the path on the command line.

    The run takes its documents `weight` times: 2 is twice, 0.5 about half of them, by content.
    """

    path: Path
    name: str
    weight: float = 1.0

    @property
    def kind(self) -> Kind:
        """How it is read."""
        kind = kind_of(self.path.name)
        assert kind is not None, self.path
        return kind

    @property
    def paths(self) -> list[Path]:
        """The file itself and, of Megatron-LM's format, its index."""
        index = index_of(self.path) if self.kind is Kind.FLAT else None
        return [self.path] if index is None else [self.path, index]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The files to read, in reading order, and what a run says about them."""

    files: Sequence[CorpusFile]
    summary: CorpusSummary


def list_corpus(
    corpus: Sequence[Path], weights: Sequence[float] = (), out: Path | None = None
) -> Corpus:
    """The files of the corpus; InputError where there is none or one cannot be read.

    `weights` has one value per corpus, or none: all 1. `out` must be outside the corpus.
    """
    walk = Walk(out)
    files: list[CorpusFile] = []
    cards: list[Path] = []
    splits: list[Path] = []
    for given, weight in zip(corpus, weights or [1.0] * len(corpus), strict=True):
        base, chosen = _paths_of(given, walk)
        files += [
            CorpusFile(path=path, name=str(path.relative_to(base)), weight=weight)
            for path in chosen.files
        ]
        cards += chosen.cards
        splits += chosen.splits
    _refuse_doubles(files)
    sizes = [(str(file.kind), _checked_bytes(file, walk)) for file in files]
    read = {path for file in files for path in file.paths}
    left_out = {
        reason: sorted({str(path) for path in paths if path not in read})
        for reason, paths in walk.left_out.items()
    }
    summary = CorpusSummary.of(sizes, left_out, [*map(str, cards)], [*map(str, splits)])
    return Corpus(files=files, summary=summary)


def _paths_of(given: Path, walk: Walk) -> tuple[Path, Chosen]:
    """The folder that names are relative to, and the files to read."""
    status = status_of(given)
    if status is None and is_pattern(given):
        paths = walk.files_of_pattern(given)
        base = Path(os.path.commonpath([path.parent for path in paths]))
        return base, select(base, paths, walk)
    if status is None:
        raise InputError(f"{given}: no such corpus file or folder")
    if stat.S_ISDIR(status.st_mode):
        return given, select(given, list(walk.files_below(given)), walk)
    if kind_of(given.name) is None:
        hint = " (give the .bin beside it)" if is_index(given.name) else _hint(given.name)
        raise InputError(f"{given}: not a kind of corpus file, expected {EXPECTED}{hint}")
    if not stat.S_ISREG(status.st_mode):
        raise not_regular(given)
    return given.parent, Chosen(files=[given])


def _hint(name: str) -> str:
    return " (decompress it first)" if compression_of(name) else ""


def _refuse_doubles(files: Sequence[CorpusFile]) -> None:
    """InputError for a file that is reached twice, by any names."""
    seen: dict[object, Path] = {}
    for file in files:
        for path in file.paths:
            status = path.stat()
            real = os.path.realpath(path)
            identity: object = (status.st_dev, status.st_ino) if status.st_ino else real
            first = seen.setdefault(identity, path)
            if first is path:
                continue
            same = "" if first == path else f" (the same file as {first})"
            raise InputError(
                f"{path}: given twice{same}; give it once (--weights 2 repeats documents)"
            )


def _checked_bytes(file: CorpusFile, walk: Walk) -> int:
    """Bytes of a file that opens and is not the pointer to one; InputError otherwise."""
    walk.refuse_inside_out(file.path)
    num_bytes = 0
    for path in file.paths:
        try:
            with path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                start = stream.read(64) if 0 < size < _LARGEST_POINTER_BYTES else b""
        except OSError as error:
            raise unreadable(path, error) from error
        for begins, (pointer, command) in _POINTERS.items():
            if start.startswith(begins):
                raise InputError(f"{path}: is {pointer}, not the file itself; run `{command}`")
        num_bytes += size
    return num_bytes
