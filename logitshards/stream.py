"""Batches for a training loop of the caller's own: the data of `train-student` alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from logitshards.reading import Dataset
from shards import dataset as stored
from shards.files.json_text import Json, canonical_json, json_differences
from shards.schema import ENTROPIES, ENTRY_COLUMNS, TAIL_LOGMASS
from shards.spec import TRAIN
from student_train.data.batches import TOKEN_COLUMNS, Batch
from student_train.data.order import START, Position
from student_train.data.read_ahead import ReadAhead
from student_train.data.stream import Stream, shares_of

_TEACHER_COLUMNS = (*ENTRY_COLUMNS, TAIL_LOGMASS, ENTROPIES)
_AHEAD = 4

AnyDataset = Dataset | str | os.PathLike[str]


def batches(
    datasets: AnyDataset | Sequence[AnyDataset],
    *,
    batch_sequences: int,
    micro_batch_sequences: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    weights: Sequence[float] = (),
    window_row_groups: int = 8,
    columns: Sequence[str] | None = None,
    split: str = TRAIN,
) -> Batches:
    """The batches of one dataset or of several, shuffled, epoch after epoch.

    A step of all ranks has `batch_sequences` lines: sequences, or as many separate documents as
    fit. Each rank gets its part, as one batch or as several of at most `micro_batch_sequences`. Two
    ranks get the same number of batches, some perhaps without a label that counts.

    `weights` are the shares of the datasets; without them, shares follow the sizes. `columns` are
    those of the teacher to read, among `ids`, `logprobs`, `tail_logmass` and `entropies`; None: all
    that every dataset has. `seed` and `window_row_groups` decide the order (docs/training.md).

    ShardError for a dataset that cannot be read. ValueError for numbers and columns that do not
    fit, and for datasets that do not mix.
    """
    opened = _open(datasets)
    if not opened:
        raise ValueError("no datasets: nothing to make batches of")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    sizes = {"batch_sequences": batch_sequences, "window_row_groups": window_row_groups}
    for name, size in {**sizes, "micro_batch_sequences": micro_batch_sequences}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} {size}: expected at least 1")
    _check_weights(weights, len(opened))
    read = _columns_to_read(opened, columns)
    _check_mix(opened, read)
    splits = [dataset.split(split) for dataset in opened]
    stream = Stream(
        splits=splits,
        shares=shares_of(weights, splits),
        seed=seed,
        window_row_groups=window_row_groups,
        step_lines=batch_sequences,
    )
    return Batches(
        stream,
        settings=_settings(opened, stream, split),
        micro_batch_lines=micro_batch_sequences or batch_sequences,
        columns=(*TOKEN_COLUMNS, *read),
        rank=rank,
        world_size=world_size,
    )


class Batches(Iterable[Batch]):
    """Endless batches of one rank; `iter` goes on where the last step ended.

    Use one iterator at a time, and close it or let go of it at the end: it decodes ahead in threads
    of its own. Reading raises ShardError for a shard that is missing or damaged.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        settings: Mapping[str, Json],
        micro_batch_lines: int,
        columns: Sequence[str],
        rank: int,
        world_size: int,
    ) -> None:
        self._stream = stream
        self._settings = settings
        self._micro_batch_lines = micro_batch_lines
        self._columns = columns
        self._rank, self._world_size = rank, world_size
        self._lines = 0
        self._positions: Sequence[Position] = [START] * len(stream.splits)

    def __iter__(self) -> Iterator[Batch]:
        batches = self._stream.batches(
            self._positions,
            lines_done=self._lines,
            micro_batch_lines=self._micro_batch_lines,
            columns=self._columns,
            rank=self._rank,
            world_size=self._world_size,
        )
        with closing(batches), ReadAhead(batches, _AHEAD) as ahead:
            for batch in ahead:
                if batch.positions is not None:
                    self._positions = batch.positions
                    self._lines += self._stream.step_lines
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the data is after the last whole step that was given out: numbers and settings.

        Plain JSON, the same on all ranks; any number of ranks continues from it.
        """
        return {
            "lines": self._lines,
            "positions": [asdict(position) for position in self._positions],
            "settings": dict(self._settings),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iterator continue from a state. ValueError naming settings that differ."""
        differences = json_differences(self._settings, state["settings"])
        if differences:
            raise ValueError(
                f"a state of other batches: {'; '.join(differences)} (here: these batches, there:"
                " the state)"
            )
        self._lines = state["lines"]
        self._positions = [Position(**position) for position in state["positions"]]


def _open(datasets: AnyDataset | Sequence[AnyDataset]) -> list[stored.Dataset]:
    if isinstance(datasets, Dataset | str | os.PathLike):
        datasets = [datasets]
    paths = [part.path if isinstance(part, Dataset) else Path(part) for part in datasets]
    return [stored.Dataset.open(path) for path in paths]


def _columns_to_read(
    datasets: Sequence[stored.Dataset], columns: Sequence[str] | None
) -> tuple[str, ...]:
    """The teacher's columns. ValueError for one that is unknown, or missing in a dataset."""
    everywhere = [
        name
        for name in _TEACHER_COLUMNS
        if all(name in dataset.spec.columns for dataset in datasets)
    ]
    if columns is None:
        return tuple(everywhere)
    for name in columns:
        if name not in _TEACHER_COLUMNS:
            raise ValueError(f"column {name!r}: expected {', '.join(_TEACHER_COLUMNS)}")
        if name not in everywhere:
            without = next(d.path for d in datasets if name not in d.spec.columns)
            raise ValueError(f"column {name!r}: {without} does not have it")
    if len({*ENTRY_COLUMNS} & {*columns}) == 1:
        raise ValueError(f"columns {', '.join(ENTRY_COLUMNS)}: expected both or none of them")
    return tuple(columns)


def _check_mix(datasets: Sequence[stored.Dataset], columns: Sequence[str]) -> None:
    """ValueError for datasets whose lines cannot stand in one batch."""
    first = datasets[0]
    for other in datasets[1:]:
        pairs: dict[str, tuple[object, object]] = {
            "tokenizer": (first.spec.tokenizer.sha256[:12], other.spec.tokenizer.sha256[:12]),
            "sequence_length": (first.spec.sequence_length, other.spec.sequence_length),
        }
        if columns:
            pairs["kind of keep method"] = tuple(  # type: ignore[assignment]
                "sampling" if d.spec.keep.is_sampled else "truncating" for d in (first, other)
            )
            pairs["temperature of the entries"] = tuple(  # type: ignore[assignment]
                d.spec.keep.temperature for d in (first, other)
            )
        for name, (expected, found) in pairs.items():
            if expected != found:
                raise ValueError(
                    f"{other.path} does not mix with {first.path}: its {name} is {found}, not"
                    f" {expected}"
                )


def _check_weights(weights: Sequence[float], num_datasets: int) -> None:
    if weights and len(weights) != num_datasets:
        raise ValueError(f"{len(weights)} weights for {num_datasets} datasets")
    if not all(weight > 0 for weight in weights):
        raise ValueError(f"weights {list(weights)}: expected values above 0")


def _settings(datasets: Sequence[stored.Dataset], stream: Stream, split: str) -> dict[str, Json]:
    """What decides which sequences come when, as plain JSON."""
    described: dict[str, Json] = {
        f"dataset_{number}": {
            "spec_sha256": hashlib.sha256(
                canonical_json(dataset.spec.to_json()).encode()
            ).hexdigest(),
            "sequences": part.num_sequences,
        }
        for number, (dataset, part) in enumerate(zip(datasets, stream.splits, strict=True), start=1)
    }
    return {
        "batch_sequences": stream.step_lines,
        "seed": stream.seed,
        "shares": list(stream.shares),
        "split": split,
        "window_row_groups": stream.window_row_groups,
        **described,
    }
