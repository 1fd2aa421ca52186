"""Batches of several ranks from real shards: together those of one process, each decoded once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shards.dataset import Dataset
from shards.reader import ShardReader
from shards.row_group import RowGroup
from shards.schema import TOKENS
from student_train.data.batches import (
    TAIL_COLUMNS,
    TARGET_COLUMNS,
    TOKEN_COLUMNS,
    Batch,
    step_batches,
    training_batches,
)
from student_train.data.lines import Source
from student_train.data.mixture import choices, order_seed
from student_train.data.order import START, Position
from student_train.model.model import head_weight
from student_train.objective.distillation import Objective
from student_train.step import batch_loss
from tests.kept_entries import batch_entries
from tests.tiny_dataset import make_dataset
from tests.tiny_runs import write_student

STEP_LINES = 12
MICRO_BATCH_LINES = 4
Lines = Counter[bytes]


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Sixteen row groups of three sequences each."""
    folder = tmp_path_factory.mktemp("joined") / "dataset"
    return Dataset.open(make_dataset(folder, train=48, sequences_per_shard=6, masked=True))


@pytest.fixture(scope="module")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Sixteen row groups of six documents each, which are packed."""
    folder = tmp_path_factory.mktemp("separate") / "dataset"
    return Dataset.open(
        make_dataset(
            folder, train=96, sequences_per_shard=12, sequences_per_row_group=6, separate=True
        )
    )


def batches(
    datasets: Sequence[Dataset],
    rank: int = 0,
    world_size: int = 1,
    *,
    starts: Sequence[Position] | None = None,
    done: int = 0,
    columns: Sequence[str] = TAIL_COLUMNS,
    window_row_groups: int = 8,
) -> Generator[Batch]:
    """The micro batches of a rank after `done` steps."""
    sources = [
        Source.of(
            dataset.split("train"),
            seed=order_seed(1, number),
            window_row_groups=window_row_groups,
            start=start,
        )
        for number, (dataset, start) in enumerate(
            zip(datasets, starts or [START] * len(datasets), strict=True)
        )
    ]
    return training_batches(
        sources,
        choices([2.0, 1.0][: len(datasets)], seed=1, first_line=done * STEP_LINES),
        step_lines=STEP_LINES,
        micro_batch_lines=MICRO_BATCH_LINES,
        columns=columns,
        rank=rank,
        world_size=world_size,
    )


def lines_of(step: Sequence[Batch]) -> Lines:
    """The lines that count, with everything that belongs to them."""
    found: Lines = Counter()
    for batch in step:
        ids, logprobs = batch_entries(batch)
        kept = logprobs > -torch.inf
        for b, labels in enumerate(batch.labels):
            length = int((labels != -100).nonzero().max()) + 1 if (labels != -100).any() else 0
            if length:
                parts = [batch.input_ids[b, :length], labels[:length], ids[b][kept[b]]]
                parts += [logprobs[b][kept[b]]]
                if batch.tail_logmass is not None:
                    parts.append(batch.tail_logmass[b, :length])
                found[b"|".join(part.numpy().tobytes() for part in parts)] += 1
    return found


@pytest.mark.parametrize("world_size", [2, 3, 5, 8, 20])
@pytest.mark.parametrize("kinds", [("joined",), ("separate",), ("joined", "separate")])
def test_ranks_train_on_the_sequences_of_one_process_step_by_step(
    kinds: tuple[str, ...], world_size: int, request: pytest.FixtureRequest
) -> None:
    datasets = [request.getfixturevalue(kind) for kind in kinds]
    with ExitStack() as stack:
        alone = stack.enter_context(closing(batches(datasets)))
        ranks = [
            stack.enter_context(closing(batches(datasets, rank, world_size)))
            for rank in range(world_size)
        ]
        for _ in range(9):  # two epochs of the joined ones
            whole = list(step_batches(alone))
            steps = [list(step_batches(rank)) for rank in ranks]
            assert len({len(step) for step in steps}) == 1
            assert all(len(batch.labels) <= MICRO_BATCH_LINES for step in steps for batch in step)
            together = sum((lines_of(step) for step in steps), Counter())
            assert together == lines_of(whole)
            assert together.total() == STEP_LINES
            assert {step[-1].positions for step in steps} == {whole[-1].positions}
            for expected, found in (
                (sum(b.num_valid for b in whole), sum(b.num_valid for s in steps for b in s)),
                (sequences(whole), [sum(n) for n in zip(*map(sequences, steps), strict=True)]),
            ):
                assert found == expected


def sequences(step: Sequence[Batch]) -> list[int]:
    """How many there are of each dataset."""
    return [sum(numbers) for numbers in zip(*(b.num_sequences for b in step), strict=True)]


@pytest.mark.parametrize("worlds", [(8, 2, 8), (3, 5), (1, 20)])
def test_a_run_goes_on_exactly_with_another_number_of_ranks(
    joined: Dataset, separate: Dataset, worlds: tuple[int, ...]
) -> None:
    datasets = [joined, separate]
    starts: Sequence[Position] = [START, START]
    with closing(batches(datasets)) as alone:
        for number, world_size in enumerate(worlds):
            with ExitStack() as stack:
                ranks = [
                    stack.enter_context(
                        closing(batches(datasets, rank, world_size, starts=starts, done=2 * number))
                    )
                    for rank in range(world_size)
                ]
                for _ in range(2):
                    steps = [list(step_batches(rank)) for rank in ranks]
                    expected = lines_of(list(step_batches(alone)))
                    assert sum((lines_of(step) for step in steps), Counter()) == expected
                    starts = steps[0][-1].positions or ()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes of the columns that are decoded, and how often a row group's tokens are."""
    counted: Counter[str] = Counter()
    read = ShardReader.read_row_group

    def counting(self: ShardReader, i: int, columns: Sequence[str], **options: bool) -> RowGroup:
        group = read(self, i, columns, **options)
        counted["bytes"] += sum(
            values.nbytes
            for name in (*columns, "entry_offsets", "token_offsets")
            if (values := getattr(group, name)) is not None
        )
        counted["groups"] += TOKENS in columns
        return group

    monkeypatch.setattr(ShardReader, "read_row_group", counting)
    return counted


@pytest.mark.parametrize(
    ("kind", "columns"),
    # The 4 bytes that a rank reads of each document of others are many beside 8 tokens alone.
    [("joined", TOKEN_COLUMNS), ("joined", TARGET_COLUMNS), ("separate", TARGET_COLUMNS)],
)
def test_ranks_decode_together_what_one_process_decodes(
    kind: str, columns: Sequence[str], decoded: Counter[str], request: pytest.FixtureRequest
) -> None:
    dataset = request.getfixturevalue(kind)
    figures = {}
    for world_size in (1, 2, 4, 8):
        decoded.clear()
        for rank in range(world_size):
            with closing(batches([dataset], rank, world_size, columns=columns)) as ahead:
                while (list(step_batches(ahead))[-1].positions or ())[0].epoch == 0:
                    pass
        figures[world_size] = decoded["groups"], decoded["bytes"]
    groups, size = figures[1]
    for number, found in figures.values():
        # What is decoded ahead when the epoch is over: at most two windows.
        assert groups <= 16 + 8 + 8
        assert abs(number - groups) <= 8
        assert found / number <= 1.1 * size / groups


@pytest.mark.parametrize("columns", [TOKEN_COLUMNS, TARGET_COLUMNS, TAIL_COLUMNS])
@pytest.mark.parametrize("kind", ["joined", "separate"])
def test_a_rank_without_lines_has_a_loss_and_gradients_of_zero(
    kind: str, columns: Sequence[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    dataset = request.getfixturevalue(kind)
    ranks = [
        batches([dataset], rank, 20, columns=columns, window_row_groups=1) for rank in range(20)
    ]
    steps = [list(step_batches(rank)) for rank in ranks]
    empty = [batch for step in steps for batch in step if not batch.num_valid]
    assert empty
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(write_student(tmp_path)))
    for batch in empty[:2]:
        assert batch.num_sequences == (0,)
        assert (batch.labels == -100).all()
        assert (batch.position_ids is not None) == (kind == "separate")
        full = next(other for step in steps for other in step if other.num_valid)
        for name in ("entries", "tail_logmass", "entropies", "position_ids"):
            assert (getattr(batch, name) is None) == (getattr(full, name) is None)
        alpha = 0.0 if columns == TOKEN_COLUMNS else 0.9
        bucket = columns == TAIL_COLUMNS
        objective = Objective(kind="kld", alpha=alpha, temperature=1.0, bucket=bucket)
        loss = batch_loss(model, batch, objective=objective)
        loss.total.backward()  # type: ignore[no-untyped-call]
        assert [part.item() for part in loss] == [0, 0, 0]
        assert head_weight(model).grad is not None
        for parameter in model.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()
    for rank in ranks:
        rank.close()


def test_the_first_rank_says_which_window_divides_evenly(
    joined: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for rank in range(3):
            next(batches([joined], rank, 3))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{joined.path}/train: 3 ranks read windows of 8 row groups")
    assert message.endswith("--window-row-groups 9 avoids this")
