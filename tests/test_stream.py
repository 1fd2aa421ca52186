"""`logitshards.batches`: the trainer's data in a loop of the caller's own."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import logitshards
from logitshards import Batch, Batches
from shards.dataset import Dataset
from student_train.data.batches import TAIL_COLUMNS, step_batches
from student_train.data.order import START
from student_train.data.stream import Stream
from tests.tiny_dataset import make_dataset


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("joined") / "dataset", train=60, masked=True)


@pytest.fixture(scope="module")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("separate") / "dataset"
    return make_dataset(folder, train=90, separate=True, seed=4)


def take(batches: Batches, count: int) -> list[Batch]:
    with closing(iter(batches)) as iterator:  # type: ignore[type-var]
        return list(islice(iterator, count))


def assert_equal(found: Sequence[Batch], expected: Sequence[Batch]) -> None:
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        assert torch.equal(batch.input_ids, other.input_ids)
        assert torch.equal(batch.labels, other.labels)
        assert all(map(torch.equal, batch.padded_entries(), other.padded_entries()))
        assert batch.num_sequences == other.num_sequences


def test_they_are_the_batches_of_the_trainer(joined: Path, separate: Path) -> None:
    with logitshards.open(joined) as dataset:
        mixed = logitshards.batches(
            [dataset, separate], batch_sequences=8, micro_batch_sequences=3, seed=5, weights=[3, 1]
        )
    found = take(mixed, 12)
    assert [batch.positions is None for batch in found] == [True, True, False] * 4
    splits = [Dataset.open(path).split("train") for path in (joined, separate)]
    trainer = Stream(
        splits=splits, shares=[0.75, 0.25], seed=5, window_row_groups=8, step_lines=8
    ).batches(
        [START, START],
        lines_done=0,
        micro_batch_lines=3,
        columns=TAIL_COLUMNS,
        rank=0,
        world_size=1,
    )
    with closing(trainer):
        assert_equal(found, list(islice(trainer, 12)))


def test_a_state_continues_with_another_number_of_ranks(joined: Path, separate: Path) -> None:
    def make(rank: int = 0, world_size: int = 1, **changes: Any) -> Batches:
        return logitshards.batches(
            [joined, separate], batch_sequences=8, rank=rank, world_size=world_size, **changes
        )

    whole = take(make(), 6)
    ranks = [make(rank, 3, micro_batch_sequences=2) for rank in range(3)]
    for batches in ranks:
        with closing(iter(batches)) as iterator:  # type: ignore[type-var]
            for _ in range(2):
                list(step_batches(iterator))
            middle = batches.state_dict()
            next(iterator)  # of a step that is not over
            assert batches.state_dict() == middle
    states = [json.loads(json.dumps(batches.state_dict())) for batches in ranks]
    assert states[0] == states[1] == states[2]
    assert states[0]["lines"] == 16
    again = make()
    again.load_state_dict(states[0])
    assert_equal(take(again, 4), whole[2:])
    assert_equal(take(make(), 2), whole[:2])


def test_an_iterator_goes_on_where_the_last_one_ended(joined: Path) -> None:
    batches = logitshards.batches(joined, batch_sequences=4)
    whole = take(logitshards.batches(joined, batch_sequences=4), 7)
    assert_equal([*take(batches, 3), *take(batches, 4)], whole)
    assert not any(thread.name.startswith(("read", "decode")) for thread in threading.enumerate())


def test_a_state_of_other_settings_is_named(joined: Path, separate: Path) -> None:
    state = logitshards.batches([joined, separate], batch_sequences=8).state_dict()
    with pytest.raises(ValueError, match=r"batch_sequences: 4 here, 8 there; seed: 1 here, 0 th"):
        logitshards.batches([joined, separate], batch_sequences=4, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"dataset_1\.sequences: .*dataset_1\.spec_sha256: "):
        logitshards.batches([separate, joined], batch_sequences=8).load_state_dict(state)
    with pytest.raises(ValueError, match=r"dataset_2: nothing here"):
        logitshards.batches(joined, batch_sequences=8).load_state_dict(state)


def test_padded_entries_are_those_of_the_rows(joined: Path) -> None:
    batch = take(logitshards.batches(joined, batch_sequences=60), 1)[0]
    ids, logprobs = batch.padded_entries()
    assert ids.shape == logprobs.shape == (*batch.labels.shape, 8)
    assert ids.dtype == torch.int64
    found: Counter[tuple[Any, ...]] = Counter()
    for b, labels in enumerate(batch.labels):
        for t in range(len(labels)):
            kept = logprobs[b, t] > -torch.inf
            if kept.any():
                found[(*ids[b, t][kept].tolist(), *logprobs[b, t][kept].tolist())] += 1
    with logitshards.open(joined) as dataset:
        rows: Counter[tuple[Any, ...]] = Counter(
            (*ids.tolist(), *logprobs.tolist())
            for row in dataset["train"]
            for ids, logprobs in zip(row.ids, row.logprobs, strict=True)
            if len(ids)
        )
    assert found == rows


def test_columns_that_are_not_wanted_are_not_read(joined: Path, tmp_path: Path) -> None:
    batch = take(logitshards.batches(joined, batch_sequences=4, columns=()), 1)[0]
    assert batch.entries is batch.tail_logmass is batch.entropies is None
    with pytest.raises(ValueError, match="'ids' of this row group was not read"):
        batch.padded_entries()
    batch = take(logitshards.batches(joined, batch_sequences=4, columns=["entropies"]), 1)[0]
    assert batch.entropies is not None
    sampled = make_dataset(tmp_path / "sampled", sampled=True)
    batch = take(logitshards.batches(sampled, batch_sequences=4), 1)[0]
    assert batch.tail_logmass is None
    tokens = make_dataset(tmp_path / "tokens", tokens_only=True)
    mixed = logitshards.batches([tokens, joined], batch_sequences=4)
    assert {batch.entries for batch in take(mixed, 3)} == {None}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"columns": ["segments"]}, "column 'segments': expected ids, logprobs, tail_logmass"),
        ({"columns": ["ids"]}, "columns ids, logprobs: expected both or none"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"batch_sequences": 0}, "batch_sequences 0: expected at least 1"),
        ({"micro_batch_sequences": 0}, "micro_batch_sequences 0"),
        ({"weights": [1, 2]}, "2 weights for 1 datasets"),
        ({"weights": [0]}, "expected values above 0"),
    ],
)
def test_what_does_not_fit_is_named(joined: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        logitshards.batches(joined, **{"batch_sequences": 4, **options})


def test_datasets_that_do_not_mix_are_named(joined: Path, tmp_path: Path) -> None:
    sampled = make_dataset(tmp_path / "sampled", sampled=True)
    with pytest.raises(ValueError, match="its kind of keep method is sampling, not truncating"):
        logitshards.batches([joined, sampled], batch_sequences=4)
    tempered = make_dataset(tmp_path / "tempered", sampled=True, temperature=2.0)
    with pytest.raises(ValueError, match=r"its temperature of the entries is 2.0, not 1.0"):
        logitshards.batches([sampled, tempered], batch_sequences=4)
    logitshards.batches([joined, sampled, tempered], batch_sequences=4, columns=())
    with pytest.raises(ValueError, match=r"'tail_logmass': .*sampled does not have it"):
        logitshards.batches([joined, sampled], batch_sequences=4, columns=["tail_logmass"])
    with pytest.raises(ValueError, match="no datasets"):
        logitshards.batches([], batch_sequences=4)
