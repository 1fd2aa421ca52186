"""Several datasets in one run: whose line is next, and whose rows are in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shards.dataset import Dataset
from student_train.data.batches import TAIL_COLUMNS, Batch, training_batches
from student_train.data.lines import Source
from student_train.data.mixture import choices, order_seed
from student_train.data.order import START, Position
from tests.kept_entries import batch_entries
from tests.packed_batches import assert_is_row, key, pieces
from tests.tiny_dataset import make_dataset

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
    """Joined documents, of which not all positions count, and separate ones that are packed."""
    folder = tmp_path_factory.mktemp("datasets")
    return [
        Dataset.open(make_dataset(folder / "joined", train=22, seed=1, masked=True)),
        Dataset.open(make_dataset(folder / "separate", train=60, seed=4, separate=True)),
    ]


def mixed(
    datasets: list[Dataset], starts: Sequence[Position] = (START, START), first_line: int = 0
) -> list[Batch]:
    """Twelve micro batches of three lines, two of them a step."""
    sources = [
        Source.of(
            dataset.split("train"),
            seed=order_seed(1, number),
            window_row_groups=4,
            start=start,
        )
        for number, (dataset, start) in enumerate(zip(datasets, starts, strict=True))
    ]
    batches = training_batches(
        sources,
        choices([0.4, 0.6], seed=1, first_line=first_line),
        step_lines=6,
        micro_batch_lines=3,
        columns=TAIL_COLUMNS,
    )
    return list(islice(batches, 12))


def test_every_line_holds_rows_of_its_own_dataset_with_their_targets(
    datasets: list[Dataset],
) -> None:
    rows = [
        {row.tokens[:-1].tobytes(): row for row in dataset.split("train").rows()}
        for dataset in datasets
    ]
    seen: list[Counter[bytes]] = [Counter(), Counter()]
    chosen = choices([0.4, 0.6], seed=1, first_line=0)
    for batch in mixed(datasets):
        dataset_of = list(islice(chosen, 3))
        num_sequences = [0, 0]
        for b, piece in pieces(batch):
            number = dataset_of[b]
            assert_is_row(piece, rows[number][key(piece[0])])
            seen[number][key(piece[0])] += 1
            num_sequences[number] += 1
        assert batch.num_sequences == tuple(num_sequences)
    # 36 lines: 14 of 22 joined sequences, 22 lines of about 30
    assert all(max(counter.values()) == 1 for counter in seen)


def test_a_mixture_is_entered_by_the_positions_of_each_dataset_and_the_lines_of_both(
    datasets: list[Dataset],
) -> None:
    whole = mixed(datasets)
    starts: Sequence[Position] = (START, START)
    for step in range(4):
        again = mixed(datasets, starts, 6 * step)
        for found, expected in zip(again, whole[2 * step :], strict=False):
            assert torch.equal(found.input_ids, expected.input_ids)
            assert all(map(torch.equal, batch_entries(found), batch_entries(expected)))
            assert found.num_sequences == expected.num_sequences
        starts = whole[2 * step + 1].positions or ()


def test_a_small_dataset_goes_through_its_epochs_while_the_other_is_in_its_first(
    tmp_path: Path, datasets: list[Dataset]
) -> None:
    small = Dataset.open(make_dataset(tmp_path / "small", train=2, seed=3))
    rows = {row.tokens[:-1].tobytes(): row for row in small.split("train").rows()}
    seen = Counter(
        key(piece[0])
        for batch in mixed([small, datasets[1]])
        for _, piece in pieces(batch)
        if key(piece[0]) in rows
    )
    assert len(seen) == 2
    assert seen.total() == pytest.approx(0.4 * 36, abs=1)
    assert abs(np.subtract(*seen.values())) <= 1


def test_datasets_of_one_size_are_not_permuted_in_the_same_way() -> None:
    assert order_seed(7, 0) == 7  # as without others
    assert len({order_seed(seed, number) for seed in range(5) for number in range(5)}) == 25
