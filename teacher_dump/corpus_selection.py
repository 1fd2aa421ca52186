"""Which of the files in a folder make up the corpus.

Left out are metadata, dataset cards and licences beside data, and what `datasets` computed from a
dataset. Several splits side by side are an error: nobody trains on the test split on purpose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from shards.errors import InputError
from teacher_dump.corpus_kinds import (
    COMPUTED,
    DOCUMENTATION,
    EXPECTED,
    LOOKS_LIKE_DATA,
    Kind,
    is_documentation,
    is_index,
    kind_of,
    why_left_out,
)
from teacher_dump.corpus_walk import Walk
from teacher_dump.token_corpus import MEGATRON_HEADER, index_of

# What `datasets` writes: into a folder of several splits, each in a folder of its own; beside the
# files of a split that was saved, which it names; and beside those of a split or of a cache.
_SEVERAL_SPLITS, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"

_SPLIT_WORDS = {
    "train": ("training", "train"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("testing", "test", "evaluation", "eval"),
}
_SPLIT_OF_WORD = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
_WORDS = "|".join(_SPLIT_OF_WORD)
_NAMED_AFTER = re.compile(rf"({_WORDS})([-_.]?\d+([-_.]of[-_.]\d+)?)?")
_MENTIONED = re.compile(rf"(?<![a-z])({_WORDS})(?![a-z])")


def select(base: Path, found: Sequence[Path], walk: Walk) -> tuple[list[Path], list[Path]]:
    """The corpus files among those found below `base`, sorted; of these, the cards.

    Cards are files named like a dataset card or a licence that are documents nevertheless: all
    files are plain text. InputError where the files are not one corpus.
    """
    for path in found:
        if path.name == _SEVERAL_SPLITS:
            _refuse_saved_splits(path.parent)
    files = []
    for path in sorted(found):
        reason = _why_not_alone(path) if is_index(path.name) else why_left_out(path.name)
        if reason is not None:
            walk.leave_out(reason, path)
        elif kind_of(path.name) is not None:
            files.append(path)
    files = _without_computed(files, walk)
    cards = [path for path in files if _is_card(path)]
    if any(kind_of(path.name) is not Kind.TEXT for path in files):
        for path in cards:
            walk.leave_out(DOCUMENTATION, path)
        files = [path for path in files if path not in set(cards)]
        cards = []
    if not files:
        raise InputError(f"{base}: no corpus file in it, expected {EXPECTED}")
    _refuse_splits(base, files)
    return files, cards


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
            raise InputError(f"{index}: the index of {data.name}, which is not there")
    return LOOKS_LIKE_DATA


def _refuse_saved_splits(folder: Path) -> None:
    names = sorted(path.parent.name for path in folder.glob(f"*/{_STATE}"))
    if len(names) > 1:
        one = folder / ("train" if "train" in names else names[0])
        raise InputError(
            f"{folder}: several splits ({', '.join(names)}), give one of them, such as --corpus"
            f" {one}"
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
            raise InputError(f"{state}: not what `datasets` writes ({error!r})") from error
        for name in sorted(names):
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: not there, but {_STATE} names it")
        return names
    if (folder / _INFO).exists():
        raise InputError(
            f"{folder}: a cache of `datasets`, with all splits and whatever was computed from them:"
            " save a split with save_to_disk, or give its .arrow files"
        )
    return None


def _refuse_splits(base: Path, files: Sequence[Path]) -> None:
    """InputError for files of several splits, by the names of files and of their folders.

    Text documents have names about anything, so that theirs must be nothing but a split's. A
    validation or test split counts beside data without a split, too.
    """
    examples: dict[str, tuple[Path, str]] = {}
    is_exact: dict[str, bool] = {}
    has_others = False
    for path in files:
        split, given, exact = _split_of(base, path)
        if split is None:
            has_others = has_others or kind_of(path.name) is not Kind.TEXT
        else:
            examples.setdefault(split, (path, given))
            is_exact[split] = is_exact.get(split, False) or (
                exact and kind_of(path.name) is not Kind.TEXT
            )
    names = sorted(examples)
    beside_others = has_others and any(is_exact[name] for name in names if name != "train")
    if len(names) < 2 and not beside_others:
        return
    kept = "train" if "train" in examples else names[0]
    others = "" if len(names) > 1 else " beside data without a split's name"
    what = "several splits" if len(names) > 1 else "a split"
    raise InputError(
        f"{base}: {what} ({', '.join(names)}){others}, give one of them, such as --corpus"
        f" '{examples[kept][1]}' (or all of them, each with its own --corpus)"
    )


def _split_of(base: Path, path: Path) -> tuple[str | None, str, bool]:
    """A file's split, what to give for it, and whether a name is the split's and nothing more."""
    relative = path.relative_to(base)
    stem = path.name.lower().split(".")[0]
    whole = _NAMED_AFTER.fullmatch(stem)
    if kind_of(path.name) is Kind.TEXT:
        mentioned = whole
    else:
        mentioned = whole or _MENTIONED.search(path.name.lower())
    if mentioned is not None:
        pattern = f"{path.parent}/{path.name[: mentioned.end(1)]}*"
        return _SPLIT_OF_WORD[mentioned[1]], pattern, whole is not None
    for number in range(len(relative.parts) - 2, -1, -1):
        folder = relative.parts[number].lower()
        named = _NAMED_AFTER.fullmatch(folder)
        mentions = named or (None if kind_of(path.name) is Kind.TEXT else _MENTIONED.search(folder))
        if mentions is not None:
            given = base.joinpath(*relative.parts[: number + 1])
            return _SPLIT_OF_WORD[mentions[1]], str(given), named is not None
    return None, "", False
