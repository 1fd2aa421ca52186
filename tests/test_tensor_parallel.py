"""Several processes that share a teacher write what one writes, and end with the command."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

import cli
from shards.inspect import verify
from shards.process.folder_lock import folder_lock
from shards.rows import Row
from teacher_dump.engines.vllm_parallel import divide_cores
from tests import gpus
from tests.test_children import ends
from tests.tiny_teacher import (
    BOUND,
    STEP,
    TOKENIZER_LENGTH,
    all_rows,
    dense_logprobs,
    dump_command,
    largest_error,
    make_tiny_teacher,
    run_dump,
    write_corpus,
)

FLOAT32 = ("--dtype", "float32")


@pytest.mark.parametrize(
    ("cores", "num_ranks", "expected"),
    [
        ([0, 1], 1, "0,1"),
        ([0, 1], 2, "0|1"),
        ([0, 1], 3, "0|0|1"),
        ([2, 3, 5, 7], 2, "2,3|5,7"),
        ([0, 1, 2, 3, 4], 2, "0,1|2,3,4"),
        ([4], 2, "4|4"),
    ],
)
def test_every_rank_gets_cores_and_no_core_is_left(
    cores: list[int], num_ranks: int, expected: str
) -> None:
    assert divide_cores(cores, num_ranks) == expected


def _refused(teacher: Path, tmp_path: Path, *more: str) -> str:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=5)
    command = dump_command(teacher, corpus, tmp_path / "out", *more)
    result = CliRunner().invoke(cli.dump_logits, command[3:], prog_name="dump-logits")
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "out").exists()
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.filterwarnings("ignore")  # vLLM's imports warn of their own accord
@pytest.mark.parametrize(
    ("engine", "heads", "vocabulary", "size", "possible"),
    [
        ("vllm", (9, 3), 384, 2, "1, 3"),
        ("vllm", (4, 2), 320, 3, "1, 2, 4"),
        ("vllm", (12, 4), 384, 3, "1, 2, 4, 12"),  # 3 does not fit the heads of keys and values
        ("vllm", (9, 3), 320, 3, "1"),  # nor 320 columns
        ("vllm-logprobs", (9, 3), 384, 2, "1, 3"),
    ],
)
def test_a_number_that_the_teacher_does_not_fit_is_refused_with_those_that_fit(
    engine: str,
    heads: tuple[int, int],
    vocabulary: int,
    size: int,
    possible: str,
    tmp_path: Path,
) -> None:
    teacher = make_tiny_teacher(tmp_path / "teacher", heads=heads, vocabulary=vocabulary)
    line = _refused(teacher, tmp_path, "--engine", engine, "--tensor-parallel", str(size))
    assert line.startswith(f"dump-logits: --tensor-parallel {size}: {size} devices cannot share")
    assert f"({heads[0]} attention heads, {heads[1]} heads of keys and values" in line
    assert line.endswith(f"possible are {possible}")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--engine", "transformers", "--tensor-parallel", "2"), "--engine transformers uses one"),
        (("--tensor-parallel", "0"), "--tensor-parallel 0: expected at least 1"),
        (("--engine-arg", "tensor_parallel_size=2"), "set by --tensor-parallel"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    more: tuple[str, ...], says: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    assert says in _refused(tiny_teacher, tmp_path, *more)


def _entries(row: Row) -> set[tuple[int, int, float]]:
    where = np.repeat(np.arange(len(row.counts)), row.counts)
    return set(zip(where.tolist(), row.ids.tolist(), row.logprobs.tolist(), strict=True))


def _agree(out: Path, alone: Path, teacher: Path) -> None:
    """Rows equal those of one process within a step of the grid, and are the teacher's."""
    rows, others = all_rows(out), all_rows(alone)
    assert rows.keys() == others.keys()
    same = different = 0
    nll: list[npt.NDArray[np.float64]] = []
    for key, row in rows.items():
        there = others[key]
        assert np.abs(row.label_logprobs - there.label_logprobs).max() <= STEP
        nll.append(np.array(row.teacher_nll - there.teacher_nll))
        same += len(_entries(row) & _entries(there))
        different += len(_entries(row) ^ _entries(there))
        exact = dense_logprobs(teacher, row.tokens, TOKENIZER_LENGTH)
        assert largest_error(row, exact) <= BOUND
    assert np.abs(nll).max() < 1e-2  # a sum over 32 positions that nothing has rounded
    assert different < 0.002 * same


def _dump(teacher: Path, corpus: Path, out: Path, size: int, *more: str) -> Path:
    before = set(os.listdir("/dev/shm"))
    command = dump_command(teacher, corpus, out, *FLOAT32, *more, "--tensor-parallel", str(size))
    result = run_dump(command)
    assert result.returncode == 0, result.stderr
    assert verify(out) == []
    record = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["recorded"][0]
    assert record["tensor_parallel"] == size
    assert set(os.listdir("/dev/shm")) <= before
    return out


@pytest.mark.slow
def test_two_processes_write_what_one_writes_and_one_continues_their_dataset(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=20)
    more = ("--max-tokens", "320")
    two = _dump(tiny_teacher, corpus, tmp_path / "two", 2, *more)
    alone = _dump(tiny_teacher, corpus, tmp_path / "alone", 1, *more)
    _agree(two, alone, tiny_teacher)
    # the number of processes does not make it another dataset
    command = dump_command(tiny_teacher, corpus, two, *FLOAT32, *more)
    again = CliRunner().invoke(cli.dump_logits, command[3:])
    assert again.exit_code == 0, again.output
    assert "complete, nothing to do" in again.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [("--engine", "vllm"), ("--engine", "vllm-logprobs")], ids=lambda more: more[1]
)
def test_three_processes_write_what_one_writes(more: tuple[str, str], tmp_path: Path) -> None:
    teacher = make_tiny_teacher(tmp_path / "teacher", heads=(9, 3), vocabulary=384)
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=60)
    three = _dump(teacher, corpus, tmp_path / "three", 3, *more)
    alone = _dump(teacher, corpus, tmp_path / "alone", 1, *more)
    _agree(three, alone, teacher)


def _descendants(pid: int) -> list[int]:
    """All processes that a process has started, and those have."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                after_name = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2]
                parents[int(folder.name)] = int(after_name.split()[1])
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [more for child in found for more in _descendants(child)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "environment"),
    [(("--tensor-parallel", "2"), {}), ((), {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})],
    ids=["two ranks", "an engine process"],
)
def test_a_killed_command_leaves_no_process_no_memory_and_no_lock(
    more: tuple[str, ...], environment: dict[str, str], tiny_teacher: Path, tmp_path: Path
) -> None:
    before = set(os.listdir("/dev/shm"))
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=3000)
    command = dump_command(tiny_teacher, corpus, tmp_path / "out", *FLOAT32, *more)
    environment = {**gpus.environment(), **environment}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("the engine says the same"):  # it is at work
            break
    children = _descendants(process.pid)
    assert len(children) >= 2, lines
    process.kill()
    process.wait()
    process.stderr.close()
    assert all(ends(child) for child in children)
    assert set(os.listdir("/dev/shm")) <= before
    with folder_lock(tmp_path / "out", "test"):
        pass


@pytest.mark.slow
def test_a_failure_in_another_process_is_the_one_that_the_error_names(
    tmp_path: Path,
) -> None:
    teacher = make_tiny_teacher(tmp_path / "teacher")
    path = teacher / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "intermediate_size": 257}), encoding="utf-8")
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=5)
    out = tmp_path / "out"
    result = run_dump(dump_command(teacher, corpus, out, "--tensor-parallel", "2"))
    assert result.returncode == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("dump-logits: "))
    # vLLM's own assertion in the worker has no text.
    begins = (
        "dump-logits: vLLM does not start with this teacher (LlamaForCausalLM): AssertionError "
    )
    assert line.startswith(begins)
    assert "starting vLLM ..." in result.stderr.splitlines()
    assert not out.exists()
