"""Describe a dataset or a shard, for a person and as JSON, and check it for damage.

Figures come from sidecars, and the sizes of columns from footers, so no page is read. The dataset
need not be complete. Means are exact: sums divided by sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shards.dataset import Dataset, Split
from shards.errors import ShardError
from shards.folder.completeness import missing_shards
from shards.keep import Keep
from shards.manifest import Manifest, load_manifest
from shards.names import TRAIN
from shards.options import OptionError
from shards.reader import ShardReader, verify_shard
from shards.rendering import format_row, render
from shards.row_group import Totals
from shards.rows import Row
from shards.tokenizer.files import check_content, check_tokenizer
from shards.writer import shard_name

__all__ = ["describe", "find_row", "format_row", "render", "verify"]

_Checked = TypeVar("_Checked")


def describe(path: Path) -> dict[str, Any]:
    """Figures of a dataset folder or of one shard file, as plain JSON.

    Counts `sequences`, `tokens` (labelled positions), `entries`, `bytes`, `missing_shards`; per
    token `teacher_cross_entropy` and `teacher_entropy` (nats, None if there is no such column),
    `entries`, `kept_mass`, bytes in all and by column; the `spec`; for a folder all of it by
    split, and what was recorded. ShardError if it is neither a dataset nor a shard.
    """
    if path.is_file():
        with ShardReader(path) as reader:
            identity = {"split": reader.sidecar.split, "shard": reader.sidecar.shard}
            spec = reader.spec
        return {**_Sums.of_shard(path).figures(), **identity, "spec": spec.to_json()}
    manifest = load_manifest(path)
    sums = {name: _Sums.of_split(path, manifest, name) for name in manifest.splits}
    return {
        **sum(sums.values(), _Sums()).figures(),
        "splits": {name: one.figures() for name, one in sums.items()},
        "spec": manifest.spec.to_json(),
        "recorded": list(manifest.recorded),
    }


def verify(path: Path) -> list[str]:
    """Read and check everything in a dataset folder or a shard file: one line for each problem.

    ShardError if there is nothing to check, because `path` is neither.
    """
    if path.is_file():
        return _problem(verify_shard, path)
    manifest = load_manifest(path)
    problems = _problem(lambda folder: check_tokenizer(folder, manifest.tokenizer_files), path)
    problems = problems or _problem(
        lambda folder: check_content(folder, manifest.spec.tokenizer.sha256), path
    )
    for name, size in manifest.splits.items():
        shards: Iterable[int] = range(manifest.spec.layout.num_shards(size.sequences))
        # ShardError: the last shard is damaged; the check of all shards below finds it again.
        with suppress(ShardError):
            shards, missing = _present(path, manifest, name)
            if missing:
                problems.append(f"{path}: {missing} shards of split {name} are missing")
        with Split(path / name, size, manifest.spec) as split:
            for shard in shards:
                problems += _problem(split.verify_shard, shard)
    return problems


def find_row(path: Path, split: str | None, number: int) -> tuple[Row, Keep]:
    """A sequence by its number in a split (None: train) of a dataset, or in a shard file.

    With it comes what the shards keep. OptionError for a number out of range or another split than
    the shard's; ShardError if `path` is neither.
    """
    if path.is_file():
        with ShardReader(path) as reader:
            if split not in (None, reader.sidecar.split):
                raise OptionError("split", f" {split}: {path} is a shard of {reader.sidecar.split}")
            first = reader.sidecar.first_sequence
            if not first <= number < first + reader.num_rows:
                last = first + reader.num_rows - 1
                raise OptionError("row", f" {number}: {path} has sequences {first} to {last}")
            return reader.row(number - first), reader.spec.keep
    dataset = Dataset.open(path)
    name = split or TRAIN
    if name not in dataset.split_names:
        raise OptionError("split", f" {name}: {path} has {', '.join(dataset.split_names)}")
    with dataset.split(name) as rows:
        if not 0 <= number < rows.num_sequences:
            last = rows.num_sequences - 1
            raise OptionError("row", f" {number}: {path} {name} has sequences 0 to {last}")
        return rows.row(number), rows.spec.keep


def _problem(check: Callable[[_Checked], None], what: _Checked) -> list[str]:
    """The error that a check raises, as a list of one line or none."""
    try:
        check(what)
    except ShardError as error:
        return [str(error)]
    return []


def _present(path: Path, manifest: Manifest, split: str) -> tuple[Iterator[int], int]:
    """The shards of a split that count, ascending, and how many do not."""
    missing = missing_shards(path, manifest, split)
    is_present = np.ones(manifest.spec.layout.num_shards(missing.num_sequences), np.bool_)
    is_present[missing.numbers] = False
    return map(int, np.flatnonzero(is_present)), len(missing)


@dataclass(frozen=True)
class _Sums:
    """What can be added up over shards: `bytes` of files, `columns` of them in pages."""

    totals: Totals = field(default_factory=Totals)
    bytes: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    missing_shards: int = 0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.totals + other.totals,
            self.bytes + other.bytes,
            self.columns + other.columns,
            self.missing_shards + other.missing_shards,
        )

    @classmethod
    def of_shard(cls, path: Path) -> _Sums:
        """The sums of one file."""
        with ShardReader(path) as reader:
            sidecar = reader.sidecar
            return cls(sidecar.totals, sidecar.bytes, Counter(reader.column_bytes()))

    @classmethod
    def of_split(cls, path: Path, manifest: Manifest, split: str) -> _Sums:
        """The sums of the shards that a split has."""
        present, missing = _present(path, manifest, split)
        shards = (cls.of_shard(path / split / shard_name(shard)) for shard in present)
        return sum(shards, cls(missing_shards=missing))

    def figures(self) -> dict[str, Any]:
        """Counts, and means per labelled position (None if there is none)."""
        totals = self.totals

        def per_token(amount: float | None) -> float | None:
            return None if amount is None or not totals.tokens else amount / totals.tokens

        return {
            "sequences": totals.sequences,
            "tokens": totals.tokens,
            "entries": totals.entries,
            "bytes": self.bytes,
            "teacher_cross_entropy": per_token(totals.teacher_nll),
            "teacher_entropy": per_token(totals.teacher_entropy),
            "entries_per_token": per_token(totals.entries),
            "kept_mass": per_token(totals.kept_mass),
            "bytes_per_token": per_token(self.bytes),
            "columns": {name: per_token(size) for name, size in self.columns.items()},
            "missing_shards": self.missing_shards,
        }
