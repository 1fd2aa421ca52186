"""Batches against the rows they were made from; the reading thread."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from shards.dataset import Dataset
from shards.errors import ShardCorruptError
from shards.rows import Row
from shards.writer import shard_name
from student_train.data.batches import (
    TAIL_COLUMNS,
    TARGET_COLUMNS,
    TOKEN_COLUMNS,
    Batch,
    for_device,
    sequential_batches,
    step_batches,
    training_batches,
)
from student_train.data.decode_ahead import decode_ahead
from student_train.data.lines import Source
from student_train.data.order import START, Position
from student_train.data.read_ahead import ReadAhead
from tests.kept_entries import batch_entries
from tests.tiny_dataset import VOCAB_SIZE, make_dataset

STEP_SEQUENCES = 5


@pytest.fixture(scope="module", params=[False, True], ids=["all count", "masked"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("datasets") / "tiny"
    return Dataset.open(make_dataset(folder, masked=request.param))


def batches(dataset: Dataset, start: Position = START, columns: object = None) -> Generator[Batch]:
    return training_batches(
        [Source.of(dataset.split("train"), seed=1, window_row_groups=4, start=start)],
        repeat(0),
        step_lines=STEP_SEQUENCES,
        micro_batch_lines=2,
        columns=TARGET_COLUMNS if columns is None else columns,  # type: ignore[arg-type]
    )


def assert_holds(batch: Batch, b: int, row: Row) -> None:
    """Line b of a batch is this row, unshifted, and padding after it."""
    length = len(row.tokens) - 1
    np.testing.assert_array_equal(batch.input_ids[b, :length], row.tokens[:-1])
    counted = np.ones(length, np.bool_) if row.loss_mask is None else row.loss_mask
    np.testing.assert_array_equal(batch.labels[b, :length], np.where(counted, row.tokens[1:], -100))
    assert (batch.labels[b, length:] == -100).all()
    ids, logprobs = batch_entries(batch)
    entries = np.concatenate([[0], np.cumsum(row.counts)])
    for t in range(batch.labels.shape[1]):
        count = row.counts[t] if t < length else 0
        kept = slice(entries[t], entries[t + 1]) if count else slice(0, 0)
        np.testing.assert_array_equal(ids[b, t, :count], row.ids[kept])
        np.testing.assert_array_equal(logprobs[b, t, :count], row.logprobs[kept])
        assert ((ids[b, t] >= 0) & (ids[b, t] < VOCAB_SIZE)).all()
        assert (logprobs[b, t, count:] == -torch.inf).all()


def test_batches_hold_the_rows_in_their_order_without_a_second_shift(dataset: Dataset) -> None:
    rows = list(dataset.split("validation").rows())
    found = list(
        sequential_batches(dataset.split("validation"), batch_lines=2, columns=TAIL_COLUMNS)
    )
    assert [len(batch.labels) for batch in found] == [2, 2, 1]
    for number, row in enumerate(rows):
        batch, b = found[number // 2], number % 2
        assert_holds(batch, b, row)
        assert batch.tail_logmass is not None
        assert row.tail_logmass is not None
        np.testing.assert_array_equal(
            batch.tail_logmass[b, : len(row.tail_logmass)], row.tail_logmass
        )
    counted = sum(len(row.counts) if row.loss_mask is None else row.loss_mask.sum() for row in rows)
    assert sum(batch.num_valid for batch in found) == counted


def test_an_epoch_of_training_batches_holds_every_row_exactly_once(dataset: Dataset) -> None:
    split = dataset.split("train")
    by_beginning = {row.tokens[:8].tobytes(): row for row in split.rows()}
    assert len(by_beginning) == split.num_sequences
    for batch in batches(dataset):
        for b in range(min(len(by_beginning), len(batch.labels))):
            beginning = batch.input_ids[b, :8].numpy().astype(np.int32)
            assert_holds(batch, b, by_beginning.pop(beginning.tobytes()))
        if not by_beginning:
            break


def test_micro_batches_add_up_to_steps(dataset: Dataset) -> None:
    found = list(islice(batches(dataset), 9))
    assert [len(batch.labels) for batch in found] == [2, 2, 1] * 3
    assert [batch.positions is not None for batch in found] == [False, False, True] * 3


def test_the_batches_of_a_step_end_with_the_one_that_has_positions(dataset: Dataset) -> None:
    ahead = batches(dataset)
    for _ in range(3):
        step = list(step_batches(ahead))
        assert [len(batch.labels) for batch in step] == [2, 2, 1]


def test_a_later_step_is_the_same_as_after_all_before_it(dataset: Dataset) -> None:
    whole = list(islice(batches(dataset), 30))
    for step in (1, 4, 7):
        (position,) = whole[3 * step - 1].positions or ()
        resumed = islice(batches(dataset, position), 6)
        for found, expected in zip(resumed, whole[3 * step :], strict=False):
            assert torch.equal(found.input_ids, expected.input_ids)
            assert torch.equal(found.labels, expected.labels)
            assert all(map(torch.equal, batch_entries(found), batch_entries(expected)))


def test_without_entry_columns_there_are_no_targets_and_the_same_labels(dataset: Dataset) -> None:
    plain = next(batches(dataset, columns=TOKEN_COLUMNS))
    full = next(batches(dataset))
    assert plain.entries is plain.tail_logmass is None
    assert torch.equal(plain.labels, full.labels)


def test_entry_columns_that_are_not_asked_for_are_not_read(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "dataset")
    dataset = Dataset.open(folder)
    expected = [batch.labels for batch in islice(batches(dataset, columns=TOKEN_COLUMNS), 9)]
    for path in (folder / "train").glob("*.parquet"):
        chunk = pq.read_metadata(path).row_group(0).column(2)
        assert chunk.path_in_schema.startswith("ids")
        with path.open("r+b") as file:
            file.seek(chunk.data_page_offset)
            file.write(b"\0" * chunk.total_compressed_size)
    found = [batch.labels for batch in islice(batches(dataset, columns=TOKEN_COLUMNS), 9)]
    assert all(map(torch.equal, found, expected))
    with pytest.raises(ShardCorruptError):
        list(islice(batches(dataset), 9))


def test_batches_for_a_gpu_are_pinned_where_they_are_read_and_others_left_alone(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(islice(batches(dataset), 4))
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:  # no machine without a GPU can
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    for device in ("cpu", "cuda"):
        source = batches(dataset)
        with ReadAhead(for_device(source, torch.device(device)), depth=2) as ahead:
            found = list(islice(ahead, 4))
        assert bool(pinned) == (device == "cuda")
        assert list(source) == []  # it was closed
        for batch, other in zip(found, expected, strict=True):
            assert torch.equal(batch.input_ids, other.input_ids)
            assert all(map(torch.equal, batch_entries(batch), batch_entries(other)))
            assert batch.num_valid == other.num_valid


def numbers(stop: int, *, fail_at: int | None = None) -> Iterator[int]:
    for number in range(stop):
        if number == fail_at:
            raise ShardCorruptError(f"at {number}")
        yield number


def threads() -> int:
    return sum(thread.name == "read-ahead" for thread in threading.enumerate())


def test_reading_ahead_keeps_items_and_their_order_and_ends() -> None:
    with ReadAhead(numbers(50), depth=2) as items:
        assert list(items) == list(range(50))
        assert list(items) == []
    assert threads() == 0


def test_what_fails_in_the_thread_is_raised_at_the_next_call_after_what_came_before() -> None:
    with ReadAhead(numbers(50, fail_at=3), depth=2) as items:
        assert list(islice(items, 3)) == [0, 1, 2]
        with pytest.raises(ShardCorruptError, match="at 3"):
            next(items)
        assert list(items) == []


def test_leaving_early_stops_the_thread_and_closes_what_it_read_from() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with ReadAhead(endless(), depth=2) as items:
        next(items)
    assert closed.is_set()
    assert threads() == 0


def test_it_reads_no_further_ahead_than_asked() -> None:
    made = []

    def counting() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with ReadAhead(counting(), depth=2) as items:
        next(items)
        threading.Event().wait(0.3)
        assert len(made) <= 4


def test_row_groups_decoded_ahead_come_in_the_order_asked_for(dataset: Dataset) -> None:
    split = dataset.split("train")
    order = [*reversed(range(split.num_row_groups)), 0, 0]
    found = list(decode_ahead(split, order, TARGET_COLUMNS, depth=3))
    assert len(found) == len(order)
    for number, group in zip(order, found, strict=True):
        expected = split.read_row_group(number, TARGET_COLUMNS)
        np.testing.assert_array_equal(group.sequences, expected.sequences)
        np.testing.assert_array_equal(group.logprobs, expected.logprobs)


def test_a_row_group_that_cannot_be_decoded_fails_in_its_turn(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "dataset")
    split = Dataset.open(folder).split("train")
    last = split.num_row_groups - 1
    shard, *_ = split.locate(split.row_group_range(last).start)
    assert shard > 0
    (folder / "train" / shard_name(shard)).unlink()
    decoded = decode_ahead(split, range(last + 1), TARGET_COLUMNS, depth=4)
    before = [g for g in range(last) if split.locate(split.row_group_range(g).start)[0] < shard]
    assert len(list(islice(decoded, len(before)))) == len(before)
    with pytest.raises(ShardCorruptError, match=shard_name(shard)):
        next(decoded)
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())


def test_no_further_row_group_is_decoded_than_asked(dataset: Dataset) -> None:
    asked = []

    def counting() -> Iterator[int]:
        while True:
            asked.append(0)
            yield 0

    decoded = decode_ahead(dataset.split("train"), counting(), TARGET_COLUMNS, depth=3)
    for _ in range(5):
        next(decoded)
    assert len(asked) == 5 + 3
    decoded.close()
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())
