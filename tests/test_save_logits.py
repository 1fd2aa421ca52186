"""`train-student --save-logits`: a dataset of what the weights said before each step."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from shards import inspect
from shards.dataset import Dataset
from shards.errors import IdentityMismatchError, InputError, LogitshardsError, RunError
from shards.keep import Draws, Keep, Threshold, Tokens, TopPK
from shards.options import OptionError
from shards.rows import Row
from shards.spec import TrainingRun
from student_train.config import TrainConfig
from student_train.data.batches import TOKEN_COLUMNS
from student_train.data.order import START
from student_train.data.stream import Stream
from student_train.own_logits.options import SaveLogits
from student_train.run import run
from tests.command_runs import COMPLETE, parsed
from tests.forked import FORKED
from tests.ranks import run_ranks
from tests.test_train_kill import kill_when, num_lines, wait
from tests.tiny_dataset import SEQUENCE_LENGTH, VOCAB_SIZE, make_dataset
from tests.tiny_runs import STEP_SEQUENCES, make_config, weights, write_student

STEPS = 3
KEEP = TopPK(top_p=0.8, top_k=8)
STEP = 1 / 16  # what stored values are rounded to, nats
NOISE = 1e-4
TIMEOUT_S = 300

# Steps that change the weights, and whose rates do not depend on how many there are.
CHANGING: dict[str, Any] = {
    "learning_rate": 0.03,
    "lr_schedule": "constant",
    "warmup_fraction": 0.0,
    "alpha": 0.0,
}


def tokens_of(steps: int) -> int:
    return steps * STEP_SEQUENCES * SEQUENCE_LENGTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of tokens, and students: a configuration, and a folder with weights."""
    folder = tmp_path_factory.mktemp("save")
    make_dataset(folder / "tokens", train=30, validation=5, tokens_only=True)
    make_dataset(folder / "masked", train=30, validation=5, tokens_only=True, masked=True)
    config = config_of(folder, folder / "first", steps=1, student=write_student(folder))
    run(config)
    return folder


def config_of(folder: Path, out: Path, *, steps: int = STEPS, **changes: Any) -> TrainConfig:
    student = str(folder / "first" / "model")
    options = {"student": student, "tokens": tokens_of(steps), **CHANGING, **changes}
    made = make_config(folder / "tokens", options.pop("student"), out)
    return replace(made, **options)


def saving(path: Path, keep: Keep = KEEP, **changes: Any) -> SaveLogits:
    return SaveLogits(save_logits=path, keep=keep, sequences_per_shard=5, **changes)


def rows_of(path: Path) -> list[Row]:
    return list(Dataset.open(path).split("train").rows())


def files_of(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def expected_tokens(dataset: Path, num_steps: int) -> list[list[int]]:
    """The inputs of the lines of every step, in the order of training."""
    split = Dataset.open(dataset).split("train")
    stream = Stream(
        splits=[split], shares=[1.0], seed=0, window_row_groups=8, step_lines=STEP_SEQUENCES
    )
    batches = stream.batches(
        [START],
        lines_done=0,
        micro_batch_lines=STEP_SEQUENCES,
        columns=TOKEN_COLUMNS,
        rank=0,
        world_size=1,
    )
    try:
        return [line for _ in range(num_steps) for line in next(batches).input_ids.tolist()]
    finally:
        batches.close()


def logprobs_of(model: Path, row: Row) -> npt.NDArray[np.float64]:
    """What a model folder says at every position of a row, over the tokenizer's vocabulary."""
    teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = teacher(torch.tensor(row.tokens[:-1])[None]).logits[0, :, :VOCAB_SIZE]
    logprobs: npt.NDArray[np.float64] = logits.double().log_softmax(-1).numpy()
    return logprobs


def distance(row: Row, logprobs: npt.NDArray[np.float64]) -> float:
    """How far the stored label log-probabilities are from these, at most."""
    assert row.label_logprobs is not None
    label = logprobs[np.arange(len(logprobs)), row.tokens[1:]]
    return float(np.abs(row.label_logprobs - label).max())


def check_row(row: Row, logprobs: npt.NDArray[np.float64]) -> None:
    """A row is what these log-probabilities give, position by position."""
    assert row.counts is not None
    assert row.ids is not None
    assert row.logprobs is not None
    assert row.tail_logmass is not None
    assert row.entropies is not None
    counted = np.ones(len(logprobs), np.bool_) if row.loss_mask is None else row.loss_mask
    ends = np.cumsum(row.counts)
    for t, (all_logprobs, end) in enumerate(zip(logprobs, ends, strict=True)):
        entries = slice(end - row.counts[t], end)
        ids, values = row.ids[entries], row.logprobs[entries]
        if not counted[t]:
            assert not len(ids)
            continue
        order = np.argsort(-all_logprobs)[: KEEP.top_k]
        mass = np.exp(all_logprobs[order])
        kept = order[(mass.cumsum() - mass) < KEEP.top_p]
        assert {*ids} == {*kept}
        assert np.abs(values - all_logprobs[ids]).max() <= STEP / 2 + NOISE
        tail = np.log1p(-np.exp(all_logprobs[ids]).sum())
        assert abs(row.tail_logmass[t] - tail) <= STEP / 2 + NOISE
        entropy = -(np.exp(all_logprobs) * all_logprobs).sum()
        assert abs(row.entropies[t] - entropy) <= STEP / 2 + NOISE
    label = logprobs[np.arange(len(logprobs)), row.tokens[1:]][counted]
    assert row.teacher_nll == pytest.approx(-label.sum(), abs=1e-3)


@pytest.mark.parametrize("source", ["tokens", "masked"])
def test_rows_are_what_the_weights_before_each_step_say(
    source: str, folder: Path, tmp_path: Path
) -> None:
    shards = [folder / source]
    before = [folder / "first" / "model"]
    for steps in (1, 2):
        out = tmp_path / f"{steps}"
        run(config_of(folder, out, steps=steps, shards=shards))
        before.append(out / "model")
    config = config_of(folder, tmp_path / "out", shards=shards)
    run(config, saving(tmp_path / "saved"))

    rows = rows_of(tmp_path / "saved")
    assert [row.sequence for row in rows] == list(range(STEPS * STEP_SEQUENCES))
    expected = expected_tokens(folder / source, STEPS)
    for row, tokens in zip(rows, expected, strict=True):
        assert row.tokens[:-1].tolist() == tokens[: len(row.tokens) - 1]
        model = before[row.sequence // STEP_SEQUENCES]
        check_row(row, logprobs_of(model, row))
    # Those of the step after would not do.
    assert distance(rows[0], logprobs_of(before[1], rows[0])) > STEP

    stored = {row.tokens.tobytes(): row for row in rows_of(folder / source)}
    for row in rows:
        np.testing.assert_array_equal(row.segments, stored[row.tokens.tobytes()].segments)
        mask = stored[row.tokens.tobytes()].loss_mask
        assert (row.loss_mask is None) == (mask is None)
        if mask is not None:
            np.testing.assert_array_equal(row.loss_mask, mask)
    spec = Dataset.open(tmp_path / "saved").spec
    assert isinstance(spec.teacher, TrainingRun)
    assert (spec.teacher.first_step, spec.teacher.head_dtype) == (1, "float32")
    assert spec.documents == replace(Dataset.open(folder / source).spec.documents, held_out=0.0)


@pytest.mark.parametrize("keep", [KEEP, Draws(draws=6), Threshold(threshold=0.1)])
def test_a_student_trains_from_what_was_saved(keep: Keep, folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "out", dtype="bfloat16")
    run(config, saving(tmp_path / "saved", keep, save_logits_from=2))
    assert inspect.verify(tmp_path / "saved") == []
    dataset = Dataset.open(tmp_path / "saved")
    assert dataset.split_names == ["train"]
    assert dataset.manifest.complete
    positions = sum(len(row.tokens) - 1 for row in rows_of(tmp_path / "saved"))
    assert dataset.split("train").num_positions == positions
    assert len(rows_of(tmp_path / "saved")) == (STEPS - 1) * STEP_SEQUENCES
    summary = run(
        config_of(folder, tmp_path / "next", shards=[tmp_path / "saved"], alpha=1.0, steps=2)
    )
    assert summary is not None
    assert summary["steps"] == 2
    run(config_of(folder, tmp_path / "plain", dtype="bfloat16"))
    for name, weight in weights(tmp_path / "plain").items():
        assert torch.equal(weights(tmp_path / "out")[name], weight)  # saving changes no weight


def train(config: TrainConfig, options: SaveLogits) -> None:
    """What a process does."""
    torch.set_num_threads(1)
    try:
        run(config, options)
    except LogitshardsError as error:
        sys.exit(error.exit_code)


def test_two_processes_save_the_rows_of_one(folder: Path, tmp_path: Path) -> None:
    more = make_dataset(tmp_path / "more", train=20, tokens_only=True, seed=1)
    for size in (1, 2):
        config = config_of(
            folder,
            tmp_path / f"out-{size}",
            shards=[folder / "tokens", more],
            micro_batch_sequences=1,
        )
        run_ranks(train, size, config, saving(tmp_path / f"{size}"))
    one, two = rows_of(tmp_path / "1"), rows_of(tmp_path / "2")
    assert len(one) == STEPS * STEP_SEQUENCES
    sources = [
        {row.tokens.tobytes() for row in rows_of(path)} for path in (folder / "tokens", more)
    ]
    assert all(any(row.tokens.tobytes() in source for row in one) for source in sources)
    for row, other in zip(one, two, strict=True):
        np.testing.assert_array_equal(row.tokens, other.tokens)
        np.testing.assert_array_equal(row.counts, other.counts)
        np.testing.assert_array_equal(row.ids, other.ids)
        assert row.logprobs is not None
        assert other.logprobs is not None
        assert np.abs(row.logprobs - other.logprobs).max() <= STEP
        assert row.teacher_nll == pytest.approx(other.teacher_nll, rel=1e-4)


KILLED_STEPS = 60


def begin(folder: Path, out: Path) -> ForkServerProcess:
    """A run of many steps, in a process of its own; a shard is full every other step."""
    config = config_of(folder, out / "run", steps=KILLED_STEPS, save_every=7)
    process = FORKED.Process(target=train, args=(config, saving(out / "saved")))
    process.start()
    return process


def test_a_run_that_was_ended_saves_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    process = begin(folder, whole)
    process.join(TIMEOUT_S)
    assert process.exitcode == 0
    checkpoints, saved = ended / "run" / "checkpoints", ended / "saved" / "train"

    kill_when(begin(folder, ended), lambda: any(saved.glob(".shard-*.tmp")))
    process = begin(folder, ended)
    wait(process, lambda: num_lines(ended / "run") > 15)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(TIMEOUT_S)
    assert process.exitcode == 128 + signal.SIGTERM
    newest = int(max(checkpoints.iterdir()).name.removeprefix("step-"))
    published = len(list(saved.glob("shard-*.json")))
    assert published == newest * STEP_SEQUENCES // 5  # all full ones, and none beyond
    kill_when(begin(folder, ended), lambda: any(checkpoints.glob(".step-*.tmp")))
    process = begin(folder, ended)
    process.join(TIMEOUT_S)
    assert process.exitcode == 0

    for left in saved.glob(".shard-*.tmp"):
        left.unlink()  # of killed processes; a run removes it after a day
    assert files_of(ended / "saved") == files_of(whole / "saved")
    assert inspect.verify(ended / "saved") == []


def test_a_checkpoint_is_due_when_full_shards_wait(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "out", steps=12, save_every=1000)
    run(config, saving(tmp_path / "saved"))
    # Two full shards are 10 rows, 3 steps of 4: the newest before the last is of such a step.
    names = sorted(path.name for path in (config.out / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000012"]


@pytest.mark.parametrize("keep", [KEEP, Draws(draws=6), Threshold(threshold=0.1)])
def test_a_run_that_diverges_says_so(keep: Keep, folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "out", learning_rate=1e30)
    with pytest.raises(RunError, match="the run diverged"):
        run(config, saving(tmp_path / "saved", keep))


def test_what_cannot_be_saved_is_refused(folder: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "separate", separate=True, tokens_only=True)
    out = tmp_path / "out"
    refused: list[tuple[dict[str, Any], SaveLogits, str]] = [
        ({"shards": [tmp_path / "separate"]}, saving(tmp_path / "s"), "separate documents"),
        ({"shards": [folder / "tokens", folder / "masked"]}, saving(tmp_path / "s"), "mask"),
        ({}, saving(out), "is in the folder of the run"),
        ({}, saving(out / "model"), "is in the folder of the run"),
        ({}, saving(tmp_path / "s", save_logits_from=4), "the run has only 3 steps"),
    ]
    for changes, options, says in refused:
        with pytest.raises(InputError, match=says):
            run(config_of(folder, out, **changes), options)
        assert not out.exists()
        assert not (tmp_path / "s").exists()


def test_another_dataset_in_the_folder_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    before = files_of(folder / "tokens")
    with pytest.raises(IdentityMismatchError, match="holds another dataset"):
        run(config_of(folder, tmp_path / "out"), saving(folder / "tokens"))
    assert files_of(folder / "tokens") == before


def test_a_run_keeps_to_its_folder_and_its_options(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "out", save_every=2)
    run(config, saving(tmp_path / "saved"))
    assert run(config, saving(tmp_path / "saved")) is not None
    with pytest.raises(InputError, match="its dataset is missing here"):
        run(config, saving(tmp_path / "other"))
    (config.out / "summary.json").unlink()
    with pytest.raises(InputError, match="own_logits"):
        run(config)
    with pytest.raises(InputError, match=r"own_logits\.first_step"):
        run(config, saving(tmp_path / "saved", save_logits_from=2))
    with pytest.raises(InputError, match="1 of 1 shards that this run has published are missing"):
        run(config, saving(tmp_path / "other"))
    before = files_of(tmp_path / "saved")
    assert run(config, saving(tmp_path / "saved")) is not None
    assert files_of(tmp_path / "saved") == before
    with pytest.raises(InputError, match="holds shards, but this run has no checkpoint"):
        run(replace(config, out=tmp_path / "another"), saving(tmp_path / "saved"))


def test_options_that_do_not_fit_are_refused() -> None:
    for given, name in (
        ({"save_logits_from": 2}, "save_logits_from"),
        ({"keep": Draws()}, "keep"),
        ({"sequences_per_shard": 2}, "sequences_per_shard"),
        ({"save_logits": Path("a"), "keep": Tokens()}, "keep"),
        ({"save_logits": Path("a"), "save_logits_from": 0}, "save_logits_from"),
    ):
        with pytest.raises(OptionError) as caught:
            SaveLogits(**given)  # type: ignore[arg-type]
        assert caught.value.name == name


def test_the_temperature_of_the_command_is_that_of_the_loss() -> None:
    words = ["--save-logits", "a", "--keep", "draws", "--draws", "9", "--temperature", "2"]
    made = parsed("train-student", *COMPLETE["train-student"], *words)
    assert made["SaveLogits"] == SaveLogits(save_logits=Path("a"), keep=Draws(draws=9))
    assert isinstance(made["TrainConfig"], TrainConfig)
    assert made["TrainConfig"].temperature == 2
