"""Which split a corpus file belongs to, by its name and those of the folders that it lies in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import InputError
from teacher_dump.corpus.kinds import Kind, kind_of

_TRAIN = "train"
_SPLIT_WORDS = {
    _TRAIN: ("training", "train"),
    "validation": ("validation", "valid", "val", "dev"),
    "held out": ("holdout", "hold_out", "hold-out", "heldout", "held_out", "held-out"),
    "test": ("testing", "test", "evaluation", "eval"),
}
_SPLIT_OF_WORD = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
_WORDS = "|".join(_SPLIT_OF_WORD)
_NAMED_AFTER = re.compile(rf"({_WORDS})([-_.]?\d+([-_.]of[-_.]\d+)?)?")
# Documents are called so, too: training.md and evaluation.md of a manual.
_TITLES = ("training", "testing", "evaluation", "eval")
_MENTIONED = re.compile(rf"(?<![a-z])({_WORDS})(?![a-z])")


@dataclass(frozen=True)
class _Named:
    """A file's split, what to give as --corpus for it, and whether a name is the split's alone."""

    split: str
    give: str
    is_exact: bool


def refuse_splits(base: Path, files: Sequence[Path]) -> list[Path]:
    """InputError for files of several splits; else those that may be held out, beside others.

    Text documents have names about anything, so that a part of theirs between dots must be nothing
    but a split's. A validation or test split counts beside data without a split, too.
    """
    named = {path: name for path in files if (name := _named(base, path)) is not None}
    give: dict[str, str] = {}
    for name in named.values():
        give.setdefault(name.split, name.give)
    has_others = any(path not in named and kind_of(path.name) is not Kind.TEXT for path in files)
    is_held_out = any(
        name.is_exact and name.split != _TRAIN and kind_of(path.name) is not Kind.TEXT
        for path, name in named.items()
    )
    names = sorted(give)
    if len(names) > 1 or (has_others and is_held_out):
        kept = _TRAIN if _TRAIN in give else names[0]
        others = "" if len(names) > 1 else " and data without a split's name"
        what = "several splits" if len(names) > 1 else "a split"
        raise InputError(
            f"{base}: contains {what} ({', '.join(names)}){others}; give one of them, such as"
            f" --corpus '{give[kept]}', or all of them, each with its own --corpus"
        )
    doubtful = [
        path
        for path in files
        if (path in named and named[path].split != _TRAIN)
        or any(_SPLIT_OF_WORD[word] != _TRAIN for word in _MENTIONED.findall(path.name.lower()))
    ]
    return doubtful if len(doubtful) < len(files) else []


def _named(base: Path, path: Path) -> _Named | None:
    """What the names of a file and of its folders say; None where they name no split."""
    is_text = kind_of(path.name) is Kind.TEXT
    name, start = path.name.lower(), 0
    for part in name.split("."):
        whole = _NAMED_AFTER.fullmatch(part)
        if whole is not None and not (is_text and Path(name).stem in _TITLES):
            give = f"{path.parent}/{path.name[: start + whole.end(1)]}*"
            return _Named(_SPLIT_OF_WORD[whole[1]], give, is_exact=True)
        start += len(part) + 1
    mentioned = None if is_text else _MENTIONED.search(name)
    if mentioned is not None:
        give = f"{path.parent}/{path.name[: mentioned.end(1)]}*"
        return _Named(_SPLIT_OF_WORD[mentioned[1]], give, is_exact=False)
    parts = path.relative_to(base).parts
    for number in range(len(parts) - 2, -1, -1):
        folder = parts[number].lower()
        whole = _NAMED_AFTER.fullmatch(folder)
        match = whole or (None if is_text else _MENTIONED.search(folder))
        if match is not None:
            give = str(base.joinpath(*parts[: number + 1]))
            return _Named(_SPLIT_OF_WORD[match[1]], give, whole is not None)
    return None
