"""Runs of several processes: the same lines in the same steps, whatever their number."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from logitshards.failures import failures_as_lines
from shards.errors import FailedElsewhereError, InputError
from student_train.config import TrainConfig
from student_train.data import batches
from student_train.processes.world import _is_own, joined
from student_train.run import run
from tests.ranks import TIMEOUT_S, exit_codes, run_ranks, start_ranks
from tests.tiny_dataset import SEQUENCE_LENGTH, make_dataset
from tests.tiny_runs import lines, write_student

STEP_SEQUENCES = 7  # no multiple of any number of processes
STEPS = 30


def train(config: TrainConfig, errors: Path) -> None:
    """What each process does: a command, with its standard error in a file of its own."""
    errors.mkdir(exist_ok=True)
    with (errors / os.environ.get("RANK", "0")).open("wb") as stream:
        os.dup2(stream.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    try:
        with failures_as_lines("train-student", debug=False):
            run(config)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)


def train_differently(config: TrainConfig, errors: Path, changes: dict[str, Any]) -> None:
    """As `train`, but the second process has options of its own."""
    train(replace(config, **changes) if os.environ["RANK"] == "1" else config, errors)


def train_until_reading_fails(config: TrainConfig, errors: Path) -> None:
    """As `train`, but the second process cannot start a thread any more after some steps."""
    make, calls = batches._mixed_batch, 0

    def fail(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 25:
            raise RuntimeError("can't start new thread")
        return make(*arguments, **options)

    if os.environ["RANK"] == "1":
        batches._mixed_batch = fail
    train(config, errors)


def join_with_another_kind(errors: Path) -> None:
    """The first process has a CPU, the second one a GPU."""
    rank = os.environ["RANK"]
    device = torch.device("cuda" if rank == "1" else "cpu")
    error = FailedElsewhereError if rank == "1" else InputError
    with pytest.raises(error, match="of one kind, found 1 x cpu, 1 x cuda"), joined(device):
        errors.write_text("they joined")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_dataset(folder / "joined", train=70, validation=9)
    make_dataset(folder / "separate", train=90, validation=9, separate=True)
    write_student(folder)
    return folder


def config_of(folder: Path, out: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "shards": [folder / "joined", folder / "separate"],
        "student": str(folder / "student.json"),
        "out": out,
        "tokens": STEPS * STEP_SEQUENCES * SEQUENCE_LENGTH,
        "batch_tokens": STEP_SEQUENCES * SEQUENCE_LENGTH,
        "micro_batch_sequences": 2,
        "learning_rate": 1e-2,
        "dtype": "float32",
        "device": "cpu",
        "save_every": 5,
        "eval_every": 10,
    }
    return TrainConfig(**options | changes)


def begin(config: TrainConfig, size: int) -> list[ForkServerProcess]:
    return start_ranks(train, size, config, errors_of(config))


def finish(config: TrainConfig, size: int) -> None:
    codes = exit_codes(begin(config, size))
    assert codes == [0] * size, printed(config, size)


def errors_of(config: TrainConfig) -> Path:
    return config.out.with_name(f"{config.out.name}-errors")


def printed(config: TrainConfig, size: int) -> list[list[str]]:
    """The lines of each process on standard error."""
    return [(errors_of(config) / str(rank)).read_text().splitlines() for rank in range(size)]


def wait_for_lines(config: TrainConfig, number: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    file = config.out / "metrics.jsonl"
    while not file.exists() or len(file.read_bytes().splitlines()) < number:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_same_within_noise(out: Path, whole: Path) -> None:
    for kind in ("train", "validation"):
        found, expected = lines(out, kind), lines(whole, kind)
        assert [line["step"] for line in found] == [line["step"] for line in expected]
        for line, other in zip(found, expected, strict=True):
            assert line.pop("kind") == other.pop("kind")
            assert line["tokens"] == other["tokens"]  # so the same sequences
            assert line == pytest.approx(other, rel=2e-3, abs=1e-5)
    one, other = (load_file(path / "model" / "model.safetensors") for path in (out, whole))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=0.02, atol=2e-3)


def assert_same(out: Path, whole: Path) -> None:
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[int, Path]:
    """Runs of 1, 2 and 3 processes that nothing interrupted."""
    for size in (1, 2, 3):
        finish(config_of(folder, folder / f"whole-{size}"), size)
    return {size: folder / f"whole-{size}" for size in (1, 2, 3)}


@pytest.mark.parametrize("size", [2, 3])
def test_a_run_of_several_processes_is_that_of_one(size: int, whole: dict[int, Path]) -> None:
    assert_same_within_noise(whole[size], whole[1])
    one, other = (json.loads((whole[n] / "summary.json").read_text()) for n in (1, size))
    for name in ("steps", "tokens", "epochs", "parameters", "validation_tokens"):
        assert one[name] == other[name], name
    names = [{path.name for path in (whole[n] / "model").iterdir()} for n in (1, size)]
    assert names[0] == names[1]


def test_a_run_that_is_stopped_continues_with_another_number_of_processes(
    folder: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    config = config_of(folder, tmp_path / "out")
    for size, after in ((2, 5), (3, 14), (1, 22)):
        processes = begin(config, size)
        wait_for_lines(config, after)
        pid = processes[-1].pid
        assert pid is not None
        os.kill(pid, signal.SIGTERM)  # to one of them: all agree
        assert exit_codes(processes) == [128 + signal.SIGTERM] * size
        said = printed(config, size)
        assert "stopped by SIGTERM after step" in said[0][-1]
        assert not any(said[1:])  # one process speaks for all
    finish(config, 2)
    assert_same_within_noise(config.out, whole[1])


def test_a_run_that_lost_a_process_is_the_same_bit_for_bit_with_as_many(
    folder: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    config = config_of(folder, tmp_path / "out")
    for rank, after in ((1, 8), (0, 18)):
        processes = begin(config, 2)
        wait_for_lines(config, after)
        processes[rank].kill()
        codes = exit_codes(processes)
        assert codes[rank] == -signal.SIGKILL
        assert codes[1 - rank] == 1
        if rank:
            assert "another process of this run ended" in printed(config, 2)[0][-1]
    finish(config, 2)
    assert_same(config.out, whole[2])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_shard_that_one_process_cannot_read_ends_all_with_one_line(
    split: str, folder: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    shards = make_dataset(tmp_path / "joined", train=70, validation=9)
    config = config_of(folder, tmp_path / "out", shards=[shards, folder / "separate"])
    number = {"train": 3, "validation": 0}[split]
    shard = shards / split / f"shard-{number:06}.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:100] + bytes(200) + content[300:])
    processes = begin(config, 2)
    assert exit_codes(processes) == [1, 1]
    said = [line for one in printed(config, 2) for line in one if shard.name in line]
    assert len(said) == 1
    assert "Traceback" not in str(printed(config, 2))
    steps = len(lines(config.out))
    assert steps == 10 if split == "validation" else steps < STEPS  # the first evaluation
    assert (config.out / "checkpoints" / f"step-{steps:08}").is_dir() or not steps
    shard.write_bytes(content)
    finish(config, 2)
    assert_same(config.out, whole[2])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"micro_batch_sequences": 1}, "computing.micro_batch_sequences: 1 here, 2 there"),
        ({"eval_every": 5}, "config.eval_every: 5 here, 10 there"),
        ({"shards": ["other", "separate"]}, "dataset.spec.documents.masked"),
    ],
)
def test_processes_with_other_settings_are_refused_before_anything_is_written(
    changes: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    if "shards" in changes:
        make_dataset(tmp_path / "other", train=70, validation=9, masked=True)
        changes = {"shards": [tmp_path / "other", folder / "separate"]}
    config = config_of(folder, tmp_path / "out")
    processes = start_ranks(train_differently, 2, config, errors_of(config), changes)
    assert exit_codes(processes) == [2, 2]
    first, second = printed(config, 2)
    assert "process 1 has other settings than process 0: " in first[-1]
    assert said in first[-1]
    assert second == []
    assert not config.out.exists()


def test_the_steps_before_a_failure_of_reading_are_saved_by_all(
    folder: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    config = config_of(folder, tmp_path / "out", save_every=100)
    processes = start_ranks(train_until_reading_fails, 2, config, errors_of(config))
    assert exit_codes(processes) == [1, 1]
    steps = len(lines(config.out))
    assert 0 < steps < STEPS
    assert (config.out / "checkpoints" / f"step-{steps:08}").is_dir()
    finish(config, 2)
    assert_same(config.out, whole[2])


def test_processes_on_cpus_and_gpus_do_not_join(tmp_path: Path) -> None:
    run_ranks(join_with_another_kind, 2, tmp_path / "errors")
    assert not (tmp_path / "errors").exists()


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("NCCL error in: a.cpp:1, unhandled system error\nncclSystemError: Out of space", True),
        ("NCCL error in: a.cpp:1, remote process exited\nncclRemoteError: A call failed", False),
        ("NCCL communicator was aborted on rank 1", False),
    ],
)
def test_an_error_of_nccl_here_is_not_taken_for_the_end_of_another_process(
    text: str, own: bool
) -> None:
    assert _is_own(dist.DistBackendError(text)) == own
