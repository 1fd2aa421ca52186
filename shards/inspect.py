"""What is in a dataset or a shard, for a person and as JSON; and whether it is undamaged.

Figures come from sidecars, and the bytes of columns from footers: no page is read, and a dataset
that is not complete yet can be looked at. Means are exact, sums over sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from shards.completeness import missing_shards
from shards.dataset import Dataset, Split
from shards.errors import ShardError
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
            place = {"split": reader.sidecar.split, "shard": reader.sidecar.shard}
            spec = reader.spec
        return {**_figures([path]), **place, "missing_shards": 0, "spec": spec.to_json()}
    manifest = load_manifest(path)
    missing = {name: _missing(path, manifest, name) for name in manifest.splits}
    shards = {name: _present(path, manifest, name, missing[name]) for name in manifest.splits}
    return {
        **_figures(shard for paths in shards.values() for shard in paths),
        "missing_shards": sum(len(numbers) for numbers in missing.values()),
        "splits": {
            name: {**_figures(paths), "missing_shards": len(missing[name])}
            for name, paths in shards.items()
        },
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
        try:
            numbers = _missing(path, manifest, name)
        except ShardError:  # of a shard that is there: it is found again with the others
            numbers = set()
        if numbers:
            problems.append(f"{path}: {len(numbers)} shards of split {name} are missing")
        num_shards = manifest.spec.layout.num_shards(size.sequences)
        with Split(path / name, size, manifest.spec) as split:
            for shard in sorted(set(range(num_shards)) - numbers):
                problems += _problem(split.verify_shard, shard)
    return problems


def find_row(path: Path, split: str | None, number: int) -> Row:
    """A sequence by its number in a split (None: train) of a dataset, or in a shard file.

    OptionError for one that is not there; ShardError if `path` is neither.
    """
    if path.is_file():
        with ShardReader(path) as reader:
            first = reader.sidecar.first_sequence
            if not first <= number < first + reader.num_rows:
                last = first + reader.num_rows - 1
                raise OptionError("row", f" {number}: {path} has sequences {first} to {last}")
            return reader.row(number - first)
    dataset = Dataset.open(path)
    name = split or TRAIN
    if name not in dataset.split_names:
        raise OptionError("split", f" {name}: {path} has {', '.join(dataset.split_names)}")
    with dataset.split(name) as rows:
        if not 0 <= number < rows.num_sequences:
            last = rows.num_sequences - 1
            raise OptionError("row", f" {number}: {path} {name} has sequences 0 to {last}")
        return rows.row(number)


def _problem(check: Callable[[_Checked], None], what: _Checked) -> list[str]:
    """The error that a check raises, as a list of one line or none."""
    try:
        check(what)
    except ShardError as error:
        return [str(error)]
    return []


def _missing(path: Path, manifest: Manifest, split: str) -> set[int]:
    return {shard for shard, _ in missing_shards(path, manifest, split)}


def _present(path: Path, manifest: Manifest, split: str, missing: set[int]) -> list[Path]:
    num_shards = manifest.spec.layout.num_shards(manifest.splits[split].sequences)
    return [path / split / shard_name(i) for i in range(num_shards) if i not in missing]


def _figures(shards: Iterable[Path]) -> dict[str, Any]:
    """Counts over these shards and means per labelled position (None if there is none)."""
    totals = Totals()
    num_bytes = 0
    columns: Counter[str] = Counter()
    for path in shards:
        with ShardReader(path) as reader:
            totals += reader.sidecar.totals
            num_bytes += reader.sidecar.bytes
            columns.update(reader.column_bytes())

    def per_token(amount: float | None) -> float | None:
        return None if amount is None or not totals.tokens else amount / totals.tokens

    return {
        "sequences": totals.sequences,
        "tokens": totals.tokens,
        "entries": totals.entries,
        "bytes": num_bytes,
        "teacher_cross_entropy": per_token(totals.teacher_nll),
        "teacher_entropy": per_token(totals.teacher_entropy),
        "entries_per_token": per_token(totals.entries),
        "kept_mass": per_token(totals.kept_mass),
        "bytes_per_token": per_token(num_bytes),
        "columns": {name: per_token(size) for name, size in columns.items()},
    }
