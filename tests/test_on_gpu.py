"""What needs a GPU. Each test runs in a process of its own, which sees the GPUs of the machine."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from shards.inspect import verify
from tests.gpus import environment
from tests.tiny_teacher import (
    BOUND,
    TAIL_NOISE,
    TOKENIZER_LENGTH,
    all_rows,
    dense_logprobs,
    dump_command,
    largest_error,
    run_dump,
    write_corpus,
)

ROOT = Path(__file__).parent.parent


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["transformers", "vllm", "vllm-logprobs"])
def test_rows_that_a_gpu_makes_are_those_of_the_dense_distribution(
    engine: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    if engine != "transformers":
        pytest.importorskip("vllm")
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=60)
    out = tmp_path / "out"
    command = dump_command(tiny_teacher, corpus, out, "--engine", engine, "--dtype", "float32")
    result = run_dump(command)
    assert result.returncode == 0, result.stderr
    assert "the engine says the same in the middle of a prompt" in result.stderr
    assert verify(out) == []
    for row in all_rows(out).values():
        exact = dense_logprobs(tiny_teacher, row.tokens, TOKENIZER_LENGTH)
        assert largest_error(row, exact, TAIL_NOISE if engine == "vllm-logprobs" else 0) <= BOUND


PROGRAM = """
import os
from tests.gpus import hide_gpus, has_gpu, environment
hide_gpus()
print(has_gpu(), os.environ.get("CUDA_VISIBLE_DEVICES"), environment().get("CUDA_VISIBLE_DEVICES"))
"""


@pytest.mark.parametrize("visible", [None, "1"])
@pytest.mark.parametrize("says", ["GPU 0: NVIDIA H100\\n", "No devices were found\\n", None])
def test_gpus_are_hidden_from_tests_and_shown_to_engines(
    says: str | None, visible: str | None, tmp_path: Path
) -> None:
    environ = {**environment(), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        environ["CUDA_VISIBLE_DEVICES"] = visible
    if says is not None:  # what nvidia-smi -L prints
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\nprintf '{says}'\n", encoding="utf-8")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environ, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    gpu = says is not None and says.startswith("GPU")
    assert result.stdout == f"{gpu} {'' if gpu else visible} {visible}\n"
