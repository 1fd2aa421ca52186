"""Several datasets in one run: whose line is next, and whose rows are in it."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shards.dataset import Dataset
from student_train.batches import TARGET_COLUMNS, Batch, training_batches
from student_train.lines import Source
from student_train.mixture import choices
from tests.tiny_dataset import SEQUENCE_LENGTH, make_dataset

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@given(weights=WEIGHTS, seed=st.integers(0, 2**63 - 1), first=st.integers(0, 2**40))
def test_any_stretch_of_lines_holds_every_dataset_by_its_share(
    weights: list[float], seed: int, first: int
) -> None:
    num_lines = 3000
    found = np.array(list(islice(choices(weights, seed=seed, first_line=first), num_lines)))
    for number, weight in enumerate(weights):
        expected = np.arange(1, num_lines + 1) * weight / sum(weights)
        assert np.abs(np.cumsum(found == number) - expected).max() < 6


@given(weights=WEIGHTS, start=st.integers(0, 3000))
def test_lines_can_be_entered_anywhere(weights: list[float], start: int) -> None:
    whole = list(islice(choices(weights, seed=1, first_line=0), start + 20))
    assert list(islice(choices(weights, seed=1, first_line=start), 20)) == whole[start:]


def test_seeds_give_other_choices_and_the_same_seed_the_same() -> None:
    first, again, other = (
        list(islice(choices([1, 2], seed=seed, first_line=0), 100)) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_shares_at_the_edge_of_what_can_be_told_apart() -> None:
    assert set(islice(choices([1.0, 1e-300], seed=0, first_line=0), 5000)) == {0}
    assert set(islice(choices([1e-300, 1.0], seed=0, first_line=0), 5000)) == {1}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    """Joined documents, and separate ones that are packed."""
    folder = tmp_path_factory.mktemp("datasets")
    return [
        Dataset.open(make_dataset(folder / "joined", train=22, seed=1)),
        Dataset.open(make_dataset(folder / "separate", train=60, seed=2, separate=True)),
    ]


def mixed(datasets: list[Dataset], starts: tuple[int, ...], first_line: int) -> list[Batch]:
    """Twelve micro batches of three lines, two of them a step."""
    sources = [
        Source.of(dataset.split("train"), seed=1, start=start)
        for dataset, start in zip(datasets, starts, strict=True)
    ]
    batches = training_batches(
        sources,
        choices([0.4, 0.6], seed=1, first_line=first_line),
        step_lines=6,
        micro_batch_lines=3,
        columns=TARGET_COLUMNS,
    )
    return list(islice(batches, 12))


def test_a_mixture_takes_each_dataset_in_its_own_order_and_every_row_once(
    datasets: list[Dataset],
) -> None:
    left = [
        Counter(row.tokens[:-1].tobytes() for row in dataset.split("train").rows())
        for dataset in datasets
    ]
    chosen = choices([0.4, 0.6], seed=1, first_line=0)
    for batch in mixed(datasets, (0, 0), 0):
        assert batch.position_ids is not None
        before = [sum(counter.values()) for counter in left]
        for b in range(3):
            counter = left[next(chosen)]
            firsts = np.flatnonzero(batch.position_ids[b] == 0)
            for first, last in zip(firsts, [*firsts[1:], SEQUENCE_LENGTH], strict=True):
                row = batch.input_ids[b, first:last].numpy().astype(np.int32)
                labels = batch.labels[b, first:last]
                if (labels != -100).any():  # else padding
                    counter[row[: int((labels != -100).sum())].tobytes()] -= 1
        after = [sum(counter.values()) for counter in left]
        assert batch.num_sequences == (before[0] - after[0], before[1] - after[1])
    # 36 lines: 14 of 22 joined sequences, 22 lines of about 30
    assert all(set(counter.values()) == {0, 1} for counter in left)


def test_a_mixture_is_entered_by_the_sequences_of_each_dataset_and_the_lines_of_both(
    datasets: list[Dataset],
) -> None:
    whole = mixed(datasets, (0, 0), 0)
    first, second = 0, 0
    for step in range(4):
        again = mixed(datasets, (first, second), 6 * step)
        for found, expected in zip(again, whole[2 * step :], strict=False):
            assert torch.equal(found.input_ids, expected.input_ids)
            assert found.num_sequences == expected.num_sequences
        for batch in whole[2 * step : 2 * step + 2]:
            first, second = first + batch.num_sequences[0], second + batch.num_sequences[1]


def test_an_epoch_of_the_smaller_dataset_may_end_before_that_of_the_other(
    tmp_path: Path, datasets: list[Dataset]
) -> None:
    small = Dataset.open(make_dataset(tmp_path / "small", train=2, seed=3))
    batches = mixed([small, datasets[0]], (0, 0), 0)
    assert sum(batch.num_sequences[0] for batch in batches) == pytest.approx(0.4 * 36, abs=1)
