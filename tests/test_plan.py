"""A plan says what the dump then does, and leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from shards import inspect
from shards.keep import Threshold
from teacher_dump.config import DumpConfig
from teacher_dump.plan import make_plan
from teacher_dump.prepare import prepare
from teacher_dump.sample import Sample, read_corpus_sample
from tests.command_runs import run
from tests.tiny_teacher import dump_command, write_corpus


def test_a_plan_agrees_with_the_dump_that_follows(tiny_teacher: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=60)
    out = tmp_path / "out"
    words = dump_command(tiny_teacher, corpus, out, "--engine", "transformers")[3:]
    result = run("dump-logits", *words, "--plan")
    assert result.exit_code == 0, result.output
    assert not out.exists()
    said = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert run("dump-logits", *words).exit_code == 0
    found = inspect.describe(out)
    assert said["tokens"] == f"{found['tokens'] + 1:,} counted"  # the splits' joint is lost
    assert float(said["entries/token"].split()[0]) == pytest.approx(
        found["entries_per_token"], rel=0.05
    )
    # the dump's many small files have a footer each
    assert float(said["bytes/token"]) < found["bytes_per_token"]
    assert re.fullmatch(r"[\d,]+ tokens/s with this engine on this machine", said["speed"])


def test_a_corpus_that_is_elsewhere_is_extrapolated(tiny_teacher: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=20)
    config = DumpConfig(
        teacher=str(tiny_teacher),
        corpus=(corpus,),
        out=tmp_path / "out",
        engine="transformers",
        sequence_length=32,
        keep=Threshold(),
    )
    plan = make_plan(config, 10**12)
    assert plan.tokens == 10**12
    assert plan.shards == -(-(10**12) // (32 * (2**21 // 32)))
    assert plan.entries_per_token < 1 / 0.0498 + 1
    assert plan.bytes == pytest.approx(1e12 * plan.bytes_per_token)
    text = "\n".join(plan.lines())
    assert "1000B as given" in text
    assert " days" in text
    # --max-tokens ends the dump there too
    ended = make_plan(replace(config, max_tokens=10**9), 10**12)
    assert ended.tokens == 10**9
    assert "1.00B by --max-tokens" in "\n".join(ended.lines())


def num_tokens(file: Path) -> int:
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    return sum(len(text.split()) + 1 for text in texts)


def sampled(teacher: Path, corpus: Path) -> Sample:
    config = DumpConfig(teacher=str(teacher), corpus=(corpus,), out=Path("out"), sequence_length=32)
    return read_corpus_sample(prepare(config))


def test_tokens_of_a_corpus_of_many_files_are_estimated_from_its_parts(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    files = [
        write_corpus(folder / f"{number}.jsonl", num_documents=400, seed=number)
        for number in range(70)
    ]
    exact = sum(map(num_tokens, files))
    monkeypatch.setattr("teacher_dump.sample.SAMPLED_CHARACTERS", 32 * 8000)
    sample = sampled(tiny_teacher, folder)
    assert 0 < sample.share < 0.3
    assert len(sample.tokens) < 0.3 * exact
    assert sample.num_tokens == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "frames.jsonl.zst", "parquet", "npy"])
def test_tokens_of_one_large_file_are_estimated_from_its_front(
    kind: str, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_corpus(tmp_path / "corpus.jsonl", num_documents=20_000)
    exact = num_tokens(lines)
    corpus = tmp_path / f"corpus.{kind}"
    if kind == "jsonl.gz":
        corpus.write_bytes(gzip.compress(lines.read_bytes(), 1))
    elif kind == "jsonl.zst":
        corpus.write_bytes(zstandard.compress(lines.read_bytes()))
    elif kind == "frames.jsonl.zst":
        whole = lines.read_bytes().splitlines(keepends=True)
        parts = [b"".join(whole[start : start + 50]) for start in range(0, len(whole), 50)]
        corpus.write_bytes(b"".join(map(zstandard.compress, parts)))
    elif kind == "parquet":
        texts = [json.loads(line)["text"] for line in lines.read_text().splitlines()]
        pq.write_table(pa.table({"text": texts}), corpus)
    else:
        np.save(corpus, np.append(np.tile([5, 6, 7, 0], exact // 4), np.ones(exact % 4, int)))
    monkeypatch.setattr("teacher_dump.sample.SAMPLED_CHARACTERS", 400_000)
    sample = sampled(tiny_teacher, corpus)
    assert 0 < sample.share < 0.5
    assert sample.num_tokens == pytest.approx(exact, rel=0.1)


def test_a_small_corpus_is_counted(tiny_teacher: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=30)
    sample = sampled(tiny_teacher, corpus)
    assert sample.share == 1
    assert sample.num_tokens == len(sample.tokens) == num_tokens(corpus)
