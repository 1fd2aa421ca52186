"""The real engine where it is short of room: prompts in pieces, preempted ones, a very long one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from shards import inspect
from shards.dataset import Dataset
from tests.tiny_teacher import (
    TOKENIZER_LENGTH,
    dense_logprobs,
    dump_command,
    make_tiny_teacher,
    run_dump,
    write_corpus,
)

BOUND = 1 / 32 + 1e-3

# A dump in this process, whose vLLM counts how often it took a running request off again.
COUNTING = """
import sys
from vllm.v1.core.sched.scheduler import Scheduler
preempted = 0
original = Scheduler._preempt_request
def count(self, *arguments, **options):
    global preempted
    preempted += 1
    return original(self, *arguments, **options)
Scheduler._preempt_request = count
sys.argv = sys.argv[1:]
import cli
try:
    cli.main()
finally:
    print("PREEMPTED", preempted)
"""


def largest_error(teacher: Path, out: Path, attention: str = "eager") -> float:
    """Of every kept log-probability from that of transformers, nats."""
    worst = 0.0
    for row in Dataset.open(out).split("train").rows():
        exact = dense_logprobs(teacher, row.tokens, TOKENIZER_LENGTH, attention=attention)
        where = np.repeat(np.arange(len(row.counts)), row.counts)
        worst = max(worst, float(np.abs(row.logprobs - exact[where, row.ids]).max()))
        label = exact[np.arange(len(exact)), row.tokens[1:]]
        worst = max(worst, float(np.abs(row.label_logprobs - label).max()))
    return worst


@pytest.mark.parametrize("engine", ["vllm", pytest.param("vllm-logprobs", marks=pytest.mark.slow)])
def test_prompts_in_pieces_that_are_preempted_come_out_whole(engine: str, tmp_path: Path) -> None:
    teacher = make_tiny_teacher(tmp_path / "teacher", max_position_embeddings=512)
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=90)
    out = tmp_path / "out"
    command = dump_command(teacher, corpus, out, "--dtype", "float32", "--sequence-length", "300")
    command += ["--held-out", "0", "--engine", engine]
    # room for one prompt and a half, taken up in pieces of 32 by several at once
    for argument in (
        "block_size=32",
        "num_gpu_blocks_override=16",
        "max_num_batched_tokens=96",
        "max_num_seqs=8",
        "long_prefill_token_threshold=32",
        "scheduler_reserve_full_isl=false",
    ):
        command += ["--engine-arg", argument]
    result = run_dump([command[0], "-c", COUNTING, *command[1:]])
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split("PREEMPTED")[1]) > 0
    assert inspect.verify(out) == []
    assert largest_error(teacher, out) <= BOUND


@pytest.mark.slow
def test_a_sequence_of_32k_tokens(tmp_path: Path) -> None:
    length = 32 << 10
    teacher = make_tiny_teacher(tmp_path / "teacher", max_position_embeddings=length)
    assert LlamaConfig.from_pretrained(teacher).max_position_embeddings == length
    words = np.random.default_rng(0).integers(1, TOKENIZER_LENGTH, length + 50)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": " ".join(f"w{word}" for word in words)}) + "\n")
    out = tmp_path / "out"
    command = dump_command(teacher, corpus, out, "--dtype", "float32", "--held-out", "0")
    result = run_dump([*command, "--sequence-length", str(length)])
    assert result.returncode == 0, result.stderr
    assert inspect.verify(out) == []
    first = Dataset.open(out).split("train").row(0)
    assert len(first.counts) == length
    assert largest_error(teacher, out, attention="sdpa") <= BOUND
