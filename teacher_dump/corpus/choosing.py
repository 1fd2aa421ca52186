"""Choose which files of a folder belong to the corpus.

This skips metadata, dataset cards and licences beside data, and files that `datasets` computed from
a dataset. Several splits in one folder are an error: nobody trains on the test split on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import InputError
from teacher_dump.corpus.kinds import (
    COMPUTED,
    DOCUMENTATION,
    EXPECTED,
    LOOKS_LIKE_DATA,
    Kind,
    compression_of,
    is_documentation,
    is_index,
    kind_of,
    uncompressed,
    why_left_out,
)
from teacher_dump.corpus.splits import refuse_splits
from teacher_dump.corpus.summary import LeftOut
from teacher_dump.corpus.token_files import MEGATRON_HEADER, index_of
from teacher_dump.corpus.walk import Walk

# Files that `datasets` writes: into a folder with a folder for each split; beside the files of a
# saved split, which it lists; and beside the files of a split or of a cache.
_SEVERAL_SPLITS, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The corpus files, sorted, and those among them that the run should mention.

    `cards` are named like a dataset card or a licence, but are documents, because all files are
    plain text. `splits` are named like a validation or test split, while other files are not.
    """

    files: Sequence[Path]
    cards: Sequence[Path] = ()
    splits: Sequence[Path] = ()


def select(base: Path, paths: Sequence[Path], walk: Walk) -> Chosen:
    """The corpus files among those found below `base`; InputError where they are not one corpus."""
    for path in paths:
        if path.name == _SEVERAL_SPLITS:
            _refuse_saved_splits(path.parent)
    files = []
    for path in sorted(paths):
        reason = _why_not_alone(path) if is_index(path.name) else why_left_out(path.name)
        if reason is not None:
            walk.leave_out(reason, path)
        elif kind_of(path.name) is not None:
            files.append(path)
    files = _without_computed(files, walk)
    _refuse_twice(files)
    cards = [path for path in files if _is_card(path)]
    if any(kind_of(path.name) is not Kind.TEXT for path in files):
        for path in cards:
            walk.leave_out(DOCUMENTATION, path)
        files = [path for path in files if path not in set(cards)]
        cards = []
    if not files:
        raise InputError(
            f"{base}: contains no corpus file, expected {EXPECTED}{_left_out(base, walk)}"
        )
    return Chosen(files=files, cards=cards, splits=refuse_splits(base, files))


def _refuse_twice(files: Sequence[Path]) -> None:
    """InputError for a file and its compressed form, whose documents would come twice."""
    found: dict[tuple[Path, str], Path] = {}
    for path in files:
        other = found.setdefault((path.parent, uncompressed(path.name)), path)
        if other != path and compression_of(path.name) != compression_of(other.name):
            raise InputError(
                f"{path}: seems to hold the documents of {other.name} again; remove one, or name"
                " the files of the corpus"
            )


def _left_out(base: Path, walk: Walk) -> str:
    """The skipped files of a folder without corpus files, as the end of a message."""
    names = {
        reason: [str(path.relative_to(base)) for path in paths if path.is_relative_to(base)]
        for reason, paths in walk.left_out.items()
    }
    texts = [of.text() for of in LeftOut.of(names)]
    return f"; left out: {', '.join(texts)}" if texts else ""


def _is_card(path: Path) -> bool:
    return kind_of(path.name) is Kind.TEXT and is_documentation(path.name)


def _why_not_alone(index: Path) -> str | None:
    """Why an index is not read: there are no tokens beside it. None for one of a `.bin`."""
    for suffix in (".bin", ".BIN"):
        data = index.with_suffix(suffix)
        if data.exists() and index_of(data) == index:
            return None
    with index.open("rb") as stream:
        if stream.read(len(MEGATRON_HEADER)) == MEGATRON_HEADER:
            data = index.with_suffix(".bin")
            raise InputError(f"{index}: is the index of {data.name}, which is missing")
    return LOOKS_LIKE_DATA


def _refuse_saved_splits(folder: Path) -> None:
    names = sorted(path.parent.name for path in folder.glob(f"*/{_STATE}"))
    if len(names) > 1:
        one = folder / ("train" if "train" in names else names[0])
        raise InputError(
            f"{folder}: contains several splits ({', '.join(names)}); give one of them, such as"
            f" --corpus {one}"
        )


def _without_computed(files: list[Path], walk: Walk) -> list[Path]:
    """Files without the `.arrow` files that `datasets` computed from a dataset later."""
    parents = sorted({path.parent for path in files if kind_of(path.name) is Kind.ARROW})
    saved = {parent: _saved_files(parent) for parent in parents}
    kept = []
    for path in files:
        names = saved.get(path.parent) if kind_of(path.name) is Kind.ARROW else None
        if names is None or path.name in names:
            kept.append(path)
        else:
            walk.leave_out(COMPUTED, path)
    return kept


def _saved_files(folder: Path) -> set[str] | None:
    """Names of the `.arrow` files that a dataset saved in the folder consists of; None: any."""
    state = folder / _STATE
    if state.exists():
        try:
            names = {entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]}
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise InputError(f"{state}: not a state file of `datasets` ({error!r})") from error
        for name in sorted(names):
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: missing, but {_STATE} lists it")
        return names
    if (folder / _INFO).exists():
        raise InputError(
            f"{folder}: is a cache of `datasets`, which mixes all splits and computed files; save a"
            " split with save_to_disk, or give its .arrow files"
        )
    return None
