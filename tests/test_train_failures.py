"""Runs that fail in the middle: one line that says what to do, and the steps before it are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.errors import InputError, RunError
from student_train import loop as training
from student_train.run import run
from tests import tiny_dataset
from tests.full_disk import largest_file
from tests.tiny_dataset import make_dataset
from tests.tiny_runs import assert_same_run, lines, make_config, saved_steps, write_student

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("datasets") / "tiny", train=60, validation=20)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def whole(shards: Path, student: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(make_config(shards, student, out, eval_every=2))
    return out


def failing(function: Callable[..., Any], error: Exception, *, at: int) -> Callable[..., Any]:
    """The function, with an error instead of one of its calls."""
    calls = []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise error
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize(
    ("error", "step"), [(OUT_OF_MEMORY, 2), (OUT_OF_MEMORY, 6), (ValueError("anything"), 6)]
)
def test_an_evaluation_that_fails_loses_no_step(
    error: Exception,
    step: int,
    shards: Path,
    student: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(shards, student, tmp_path / "out", eval_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", failing(training.evaluate, error, at=step // 2))
        with pytest.raises(RunError if error is OUT_OF_MEMORY else ValueError):
            run(config)
    assert saved_steps(config.out) == [step]
    assert [line["step"] for line in lines(config.out, "validation")] == list(range(2, step, 2))
    run(config)
    assert_same_run(config.out, whole)


def test_memory_that_runs_out_in_a_step_keeps_the_steps_before_it_and_names_the_option(
    shards: Path, student: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(shards, student, tmp_path / "out", eval_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(training, "batch_loss", failing(training.batch_loss, OUT_OF_MEMORY, at=10))
        with pytest.raises(RunError, match=r"2\.00 GiB\.\); .* --micro-batch-sequences") as found:
            run(config)
    assert "\n" not in str(found.value)
    assert saved_steps(config.out) == [4]  # two micro batches a step
    other = tmp_path / "other"
    shutil.copytree(config.out, other)
    run(config)
    assert_same_run(config.out, whole)
    run(replace(config, out=other, micro_batch_sequences=1, gradient_checkpointing=True))
    now = json.loads((other / "run.json").read_text())["config"]  # as the report shows it
    assert (now["micro_batch_sequences"], now["gradient_checkpointing"]) == (1, True)
    for line, expected in zip(lines(other), lines(whole), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_weights_that_are_half_updated_are_not_saved(
    shards: Path, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(shards, student, tmp_path / "out", save_every=2)
    monkeypatch.setattr(
        torch.optim.AdamW, "step", failing(torch.optim.AdamW.step, OUT_OF_MEMORY, at=4)
    )
    with pytest.raises(RunError, match=r"in the middle of a step .* --micro-batch-sequences"):
        run(config)
    assert saved_steps(config.out) == [2]


def test_without_a_number_of_steps_a_run_is_saved_by_the_clock(
    shards: Path, student: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(shards, student, tmp_path / "out", eval_every=2)
    with monkeypatch.context() as patch:
        patch.setattr("student_train.saving._SAVE_EVERY_S", 0.0)
        patch.setattr("student_train.saving._OF_WRITING", 0)
        patch.setattr(training, "batch_loss", failing(training.batch_loss, KeyError(), at=9))
        with pytest.raises(KeyError):
            run(config)
    assert saved_steps(config.out) == [3, 4]
    run(config)
    assert_same_run(config.out, whole)


def test_an_export_that_fails_costs_neither_steps_nor_evaluation(
    student: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_dataset(tmp_path / "dataset", train=60, validation=20)
    config = make_config(shards, student, tmp_path / "out", eval_every=6)
    tokenizer, aside = shards / "tokenizer", tmp_path / "tokenizer"
    evaluate = training.evaluate

    def take_the_tokenizer_away(*arguments: Any, **options: Any) -> Any:
        tokenizer.rename(aside)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(training, "evaluate", take_the_tokenizer_away)
    with pytest.raises(RunError, match="dataset/tokenizer: No such file or directory; "):
        run(config)
    aside.rename(tokenizer)
    monkeypatch.setattr(training, "evaluate", failing(evaluate, AssertionError("again"), at=1))
    summary = run(config)
    (line,) = lines(config.out, "validation")
    assert line == lines(whole, "validation")[-1]
    assert summary["validation_cross_entropy"] == line["cross_entropy"]
    assert 1 < summary["tokens_per_s"] == summary["tokens"] / summary["seconds"] < 1e6


# The thread of TensorBoard's writer says by itself what went wrong.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("room", [0, 4096])
def test_a_folder_that_cannot_be_written_is_named_with_the_reason(
    room: int, shards: Path, student: str, tmp_path: Path
) -> None:
    config = make_config(shards, student, tmp_path / "out", tokens=40 * 64)
    refusal = pytest.raises(RunError, match=r"/out.*: File too large; .* the same command")
    with refusal, largest_file(room):
        run(config)
    assert (config.out / "run.json").exists() == (room > 0)
    assert run(config)["steps"] == 40


def test_a_validation_split_of_which_nothing_counts_is_refused_before_training(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_row = tiny_dataset.make_row

    def without_labels(*arguments: Any, **options: Any) -> Any:
        row = make_row(*arguments, **options)
        if options["split"] == "train":
            return row
        nothing: dict[str, Any] = {"ids": row.ids[:0], "logprobs": row.logprobs[:0]}
        for column in ("counts", "tail_logmass", "loss_mask"):
            nothing[column] = np.zeros_like(getattr(row, column))
        return replace(row, **nothing, teacher_nll=0.0, teacher_entropy=0.0)

    monkeypatch.setattr(tiny_dataset, "make_row", without_labels)
    shards = make_dataset(tmp_path / "dataset", masked=True)
    config = make_config(shards, student, tmp_path / "out")
    with pytest.raises(InputError, match="validation: no position counts as a label"):
        run(config)
    assert not config.out.exists()


def test_a_training_split_of_which_nothing_counts_is_refused(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask that is false everywhere trained to the end, with a loss of 0."""
    make_row = tiny_dataset.make_row

    def masked(sequence: int, num_tokens: int, **options: Any) -> Any:
        row = make_row(sequence, num_tokens, **options)
        nothing = np.full(num_tokens - 1, options["split"] != "train")
        return replace(tiny_dataset.without_teacher(row), loss_mask=nothing)

    monkeypatch.setattr(tiny_dataset, "make_row", masked)
    shards = make_dataset(tmp_path / "shards", masked=True, tokens_only=True)
    config = make_config(shards, student, tmp_path / "out", alpha=0.0)
    with pytest.raises(InputError, match="train: no position counts as a label"):
        run(config)
    assert not config.out.exists()
