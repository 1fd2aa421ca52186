"""`kill -9` of a real training process at its worst moments, then the same run again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from transformers import LlamaConfig

from shards.errors import LogitshardsError
from shards.process.folder_lock import folder_lock
from student_train.config import TrainConfig
from student_train.run import run
from tests.forked import FORKED
from tests.tiny_dataset import SEQUENCE_LENGTH, make_dataset

TIMEOUT_S = 300
KINDS = ("train", "validation")


def train(shards: str, student: str, out: Path, errors: Path) -> None:
    """What a process does."""
    with errors.open("wb") as stream:
        os.dup2(stream.fileno(), sys.stderr.fileno())
    try:
        run(
            TrainConfig(
                shards=[Path(shards)],
                student=student,
                out=out,
                tokens=160 * 128,
                batch_tokens=128,
                micro_batch_sequences=3,
                learning_rate=1e-2,
                dtype="float32",
                save_every=40,
                eval_every=30,
            )
        )
    except LogitshardsError as error:  # as the command line does it
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A dataset and a student."""
    folder = tmp_path_factory.mktemp("kill")
    shards = make_dataset(folder / "dataset", train=50, validation=6)
    LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQUENCE_LENGTH,
    ).save_pretrained(folder)
    return str(shards), str((folder / "config.json").rename(folder / "student.json"))


def errors_of(out: Path) -> Path:
    return out.with_name(f"{out.name}-errors")


def start(arguments: tuple[str, str], out: Path) -> ForkServerProcess:
    out.parent.mkdir(exist_ok=True)
    process = FORKED.Process(target=train, args=(*arguments, out, errors_of(out)))
    process.start()
    return process


def end(process: ForkServerProcess, out: Path) -> list[str]:
    """The lines that a process wrote on standard error, once it has ended."""
    process.join(TIMEOUT_S)
    assert process.exitcode is not None
    return errors_of(out).read_text(encoding="utf-8").splitlines()


def finish(arguments: tuple[str, str], out: Path) -> None:
    process = start(arguments, out)
    errors = end(process, out)
    assert process.exitcode == 0, errors


def wait(process: ForkServerProcess, reached: Callable[[], bool]) -> None:
    """Until something is true, while the process runs."""
    deadline = time.monotonic() + TIMEOUT_S
    while not reached():
        assert process.exitcode is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def kill_when(process: ForkServerProcess, reached: Callable[[], bool]) -> None:
    """Kill a process, which must still be running, as soon as something is true."""
    wait(process, reached)
    process.kill()
    process.join(TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL


def num_lines(out: Path) -> int:
    file = out / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


@pytest.fixture(scope="module")
def whole(arguments: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    finish(arguments, folder)
    return folder


def test_a_killed_run_ends_like_one_that_was_never_killed(
    arguments: tuple[str, str], whole: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    checkpoints = killed / "checkpoints"

    # Before the first checkpoint: from the beginning again.
    kill_when(start(arguments, killed), lambda: num_lines(killed) > 20)
    # While a checkpoint is written.
    kill_when(start(arguments, killed), lambda: any(checkpoints.glob(".step-*.tmp")))
    # Some steps after one.
    kill_when(
        start(arguments, killed),
        lambda: any(checkpoints.glob("step-*80")) and num_lines(killed) > 95,
    )
    finish(arguments, killed)

    for name in ("model/model.safetensors", "metrics.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    found = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    steps = {kind: [line["step"] for line in found if line["kind"] == kind] for kind in KINDS}
    assert steps == {"train": list(range(1, 161)), "validation": [30, 60, 90, 120, 150, 160]}
    timed = [json.loads(line) for line in (killed / "speed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timed] == list(range(1, 161))
    assert not list(killed.rglob("*.tmp"))


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_with_a_checkpoint_of_the_step(
    number: signal.Signals, arguments: tuple[str, str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(arguments, out)
    wait(process, lambda: num_lines(out) > 10)
    assert process.pid is not None
    os.kill(process.pid, number)
    errors = end(process, out)
    assert process.exitcode == 128 + number
    (line,) = [line for line in errors if "run the same command again" in line]
    step = int(line.split(f"{number.name} after step ")[1].split(";")[0])
    assert 10 < step < 40
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{step:08}"]
    finish(arguments, out)
    for name in ("model/model.safetensors", "metrics.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_two_runs_do_not_write_into_one_folder(arguments: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with folder_lock(out, "test"):
        process = start(arguments, out)
        errors = end(process, out)
    assert process.exitcode == 2
    assert "another train-student is writing to it" in errors[-1]
    assert not any(out.iterdir())


def test_a_shard_that_goes_bad_is_named_and_the_steps_before_it_are_kept(
    arguments: tuple[str, str], whole: Path, tmp_path: Path
) -> None:
    shards, student = arguments
    copy = tmp_path / "dataset"
    shutil.copytree(shards, copy)
    shard = copy / "train" / "shard-000003.parquet"
    content = shard.read_bytes()
    out = tmp_path / "out"
    process = start((str(copy), student), out)
    wait(process, lambda: num_lines(out) > 50)
    with shard.open("r+b") as stream:  # in place, as a failing disk changes it under the map
        stream.seek(len(content) // 3)
        stream.write(bytes(255 - byte for byte in content[len(content) // 3 :][:64]))
    errors = end(process, out)
    assert process.exitcode == 1
    assert "shard-000003.parquet" in errors[-1]
    newest = max((out / "checkpoints").iterdir())
    assert int(newest.name.removeprefix("step-")) > 40
    shard.write_bytes(content)
    finish((str(copy), student), out)
    for name in ("model/model.safetensors", "metrics.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
