"""`--workers N`: engines in Ray actors write one dataset, and losing one loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shards import inspect
from shards.errors import LogitshardsError, RunError
from shards.manifest import load_manifest
from shards.options import OptionError
from teacher_dump.collector import ShardPlan
from teacher_dump.config import DumpConfig
from teacher_dump.dump import run
from teacher_dump.processes import workers
from teacher_dump.processes.ranks import ClusterOptions
from teacher_dump.processes.ray_worker import Failure, RayWorker
from teacher_dump.shard_pass import DumpSummary
from tests.gpus import environment
from tests.test_ranks import config_of
from tests.tiny_teacher import ROOT, dump_command, write_corpus

pytest.importorskip("ray")
# Ray leaves sockets and files open when it shuts down.
pytestmark = pytest.mark.filterwarnings("ignore")

TWO = ClusterOptions(workers=2)


def files_of(out: Path) -> dict[str, bytes]:
    """The Parquet files of a dataset."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.glob("*/*.parquet")}


def test_two_workers_write_what_one_process_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    alone = replace(config, out=tmp_path / "alone")
    run(alone)
    # Workers of a cluster have another working directory than the head.
    head = workers._Head

    def with_whole_paths(ray: Any, config: DumpConfig, *arguments: Any) -> Any:
        assert all(path.is_absolute() for path in (config.out, *config.corpus))
        assert Path(str(config.tokenizer)).is_absolute()
        return head(ray, config, *arguments)

    monkeypatch.setattr(workers, "_Head", with_whole_paths)
    monkeypatch.chdir(tmp_path)
    here = replace(
        config,
        out=config.out.relative_to(tmp_path),
        corpus=[path.relative_to(tmp_path) for path in config.corpus],
        tokenizer=str(Path(str(config.tokenizer)).relative_to(tmp_path)),
    )
    summary = run(here, TWO)
    assert files_of(config.out) == files_of(alone.out)
    assert summary.shards == len(files_of(alone.out))
    assert summary.positions == sum(s.positions for s in load_manifest(config.out).splits.values())
    assert load_manifest(config.out).complete
    assert run(config, TWO).complete_before


@pytest.mark.slow
def test_a_shard_that_kills_its_workers_ends_the_run_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Poisoned(RayWorker):
        def write(self, plan: ShardPlan) -> DumpSummary | Failure:
            if (plan.split, plan.shard) == ("train", 3):
                os._exit(1)
            return super().write(plan)

    monkeypatch.setattr(workers, "RayWorker", Poisoned)
    config = config_of(tmp_path)
    with pytest.raises(RunError, match=r"train/shard-000003.parquet: lost 3 workers"):
        run(config, TWO)
    assert caplog.text.count("a worker was lost") == 2
    there = files_of(config.out)
    assert there
    assert "train/shard-000003.parquet" not in there
    monkeypatch.undo()
    run(config)
    assert inspect.verify(config.out) == []
    assert there.items() < files_of(config.out).items()


@pytest.mark.slow
def test_what_a_worker_reports_ends_the_run_at_once_as_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(RayWorker):
        def start(self) -> Failure | None:
            return Failure(text="--engine vllm: does not take this", exit_code=2)

    monkeypatch.setattr(workers, "RayWorker", Refusing)
    config = config_of(tmp_path)
    with pytest.raises(LogitshardsError, match=r"^--engine vllm: does not take this$") as caught:
        run(config, TWO)
    assert caught.value.exit_code == 2

    class Blind(RayWorker):
        """A worker on a machine without the file system."""

        def __init__(self, config: DumpConfig, *rest: object) -> None:
            super().__init__(replace(config, out=tmp_path / "elsewhere"), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(workers, "RayWorker", Blind)
    with pytest.raises(RunError, match="does not see the dataset; all workers need the same file"):
        run(config, TWO)


@pytest.mark.slow
def test_more_workers_than_the_machine_has_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"workers 1000: Ray has no GPU and \d+ CPU cores"):
        run(config_of(tmp_path), ClusterOptions(workers=1000))


def test_the_gpus_of_a_worker_are_those_of_one_machine() -> None:
    class Cluster:
        def cluster_resources(self) -> dict[str, float]:
            return {"GPU": 8.0, "CPU": 16.0}

        def nodes(self) -> list[dict[str, Any]]:
            gone = {"Alive": False, "Resources": {"GPU": 8.0}}
            return [{"Alive": True, "Resources": {"GPU": 4.0}}] * 2 + [gone]

    assert workers._gpus_per_worker(Cluster(), 2, 4) == 4
    assert workers._gpus_per_worker(Cluster(), 8, 1) == 1
    with pytest.raises(OptionError, match="1 of 8 GPUs each: Ray has machines with 4, 4 GPUs"):
        workers._gpus_per_worker(Cluster(), 1, 8)


@pytest.mark.parametrize("conflict", [{"rank": 0, "world_size": 2}, {"prepare": True}])
def test_workers_and_ranks_contradict_each_other(conflict: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="workers 2: contradicts"):
        ClusterOptions(workers=2, **conflict)  # type: ignore[arg-type]


def _ray_workers(group: int) -> list[int]:
    """Processes of our actors below the process group's session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                title = (entry / "cmdline").read_bytes().decode(errors="replace")
                session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
            except OSError:
                continue
            if "RayWorker.write" in title and session == group:
                found.append(int(entry.name))
    return found


def test_a_killed_worker_of_the_real_engine_costs_one_shard_written_again(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus, out = write_corpus(tmp_path / "corpus.jsonl", num_documents=300), tmp_path / "out"
    command = [*dump_command(tiny_teacher, corpus, out), "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env=environment())  # fmt: skip
    try:
        while not (killable := _ray_workers(process.pid)):
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(killable[0], signal.SIGKILL)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "a worker was lost" in err
    assert inspect.verify(out) == []
    assert load_manifest(out).complete
