"""A run takes the GPU that is there, and never a CPU in silence in place of one it cannot use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shards.errors import InputError
from student_train import device as module
from student_train.device import describe_device, training_device
from student_train.run import run
from tests.tiny_dataset import make_dataset
from tests.tiny_runs import make_config, write_student

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Makes this machine look as if it had some GPUs, of which torch sees some."""

    def make(*, files: int, seen: int, visible: str | None = None) -> None:
        for number in range(files):
            (tmp_path / f"nvidia{number}").touch()
        monkeypatch.setattr(module, "_GPU_FILES", ((tmp_path, "nvidia[0-9]*"),))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


def test_auto_takes_the_gpu_of_the_process_or_the_cpu_where_there_is_none(
    machine: Machine,
) -> None:
    machine(files=0, seen=0)
    assert training_device("auto") == torch.device("cpu")
    machine(files=4, seen=4)
    assert training_device("auto") == torch.device("cuda", 0)
    assert training_device("auto", 3) == torch.device("cuda", 3)
    assert training_device("cuda", 1) == torch.device("cuda", 1)
    assert training_device("cpu", 1) == torch.device("cpu")


def test_a_process_that_sees_one_gpu_takes_it_whatever_its_number(machine: Machine) -> None:
    machine(files=8, seen=1, visible="5")
    assert training_device("auto", 5) == torch.device("cuda", 0)


def test_more_processes_than_gpus_are_refused(machine: Machine) -> None:
    machine(files=2, seen=2)
    with pytest.raises(InputError, match="process 3 of this machine has no GPU: torch sees 2;"):
        training_device("auto", 2)


@pytest.mark.parametrize(
    ("build", "cause"),
    [
        ((None, None), r"torch \S+ is built without CUDA"),
        (("13.0", None), "The NVIDIA driver on your system is too old"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_an_error_with_its_cause_and_the_way_out(
    build: tuple[str | None, str | None],
    cause: str,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nx")

    machine(files=1, seen=0)
    monkeypatch.setattr(torch.version, "cuda", build[0])
    monkeypatch.setattr(torch.version, "hip", build[1])
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(InputError, match=rf"nvidia0\).*: {cause}.*; .* --device cpu$") as caught:
        training_device("auto")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=rf"--device cuda: torch finds no GPU \({cause}"):
        training_device("cuda")
    assert training_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("visible", ["", "-1"])
def test_gpus_that_are_hidden_on_purpose_are_not_missed(visible: str, machine: Machine) -> None:
    machine(files=1, seen=0, visible=visible)
    assert training_device("auto") == torch.device("cpu")
    assert describe_device(torch.device("cpu")).endswith("; CUDA_VISIBLE_DEVICES hides all GPUs)")


def test_the_log_names_the_device_before_anything_is_written(
    tmp_path: Path, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine(files=1, seen=0)
    shards = make_dataset(tmp_path / "dataset")
    student = write_student(tmp_path / "student")
    config = make_config(shards, student, tmp_path / "out", device="auto")
    with pytest.raises(InputError, match="torch cannot use it"):
        run(config)
    assert not config.out.exists()
    with caplog.at_level(logging.INFO):
        run(make_config(shards, student, tmp_path / "out"))
    assert f"device: cpu ({torch.get_num_threads()} threads)" in caplog.messages


def test_a_run_may_go_on_on_another_device(tmp_path: Path) -> None:
    shards = make_dataset(tmp_path / "dataset")
    student = write_student(tmp_path / "student")
    run(make_config(shards, student, tmp_path / "out", device="auto"))
    summary = run(make_config(shards, student, tmp_path / "out", device="cpu"))
    assert summary["steps"] == 6
