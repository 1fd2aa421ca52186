"""Real passes through the command: what is on disk stays, and what is missing is added."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from shards import inspect
from teacher_dump.tokenizer import load_tokenizer
from teacher_dump.tokens.encoding import make_encoder
from tests.command_runs import refused, run, the_line
from tests.full_disk import largest_file
from tests.gpus import environment
from tests.tiny_teacher import (
    BOUND,
    STEP,
    TOKENIZER_LENGTH,
    TOP_P_K,
    all_rows,
    dense_logprobs,
    dump_command,
    largest_error,
    run_dump,
    write_corpus,
)


def dump(*words: str) -> Result:
    """A dump in this process."""
    return run("dump-logits", *words)


def words_of(
    teacher: Path, corpus: Path, out: Path, *more: str, keep: tuple[str, ...] = TOP_P_K
) -> list[str]:
    """The words of a small dump with the engine transformers."""
    return dump_command(teacher, corpus, out, "--engine", "transformers", *more, keep=keep)[3:]


def test_draws_of_a_continued_dump_are_those_of_an_uninterrupted_one(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=40)
    keep = ("--keep", "draws", "--draws", "30", "--temperature", "2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, sizes in ((whole, ("1000",)), (parts, ("300", "1000"))):
        for size in sizes:
            more = ("--dtype", "float32", "--max-tokens", size)
            assert dump(*words_of(tiny_teacher, corpus, out, *more, keep=keep)).exit_code == 0
    rows = all_rows(whole)
    assert len(rows) > 20
    for key, row in all_rows(parts).items():
        assert np.array_equal(row.ids, rows[key].ids)
        assert np.array_equal(row.logprobs, rows[key].logprobs)
    manifest = json.loads((whole / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["spec"]["keep"] == {
        "method": "draws", "draws": 30, "temperature": 2.0, "logprob_step": STEP
    }  # fmt: skip


def _wait_for(condition, process: subprocess.Popen[str], limit_s: float = 240) -> None:  # type: ignore[no-untyped-def,type-arg]
    started = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < limit_s
        time.sleep(0.02)


def _printed(engine: str, command: list[str]) -> str:
    """What a dump prints; a process of its own imports vLLM."""
    if engine == "vllm":
        ended = run_dump(command)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout
    result = dump(*command[3:])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def test_a_dump_that_was_killed_continues_and_loses_and_repeats_nothing(
    engine: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=400)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--engine", engine, "--dtype", "float32")
    _printed(engine, dump_command(tiny_teacher, corpus, whole, *more))

    command = dump_command(tiny_teacher, corpus, killed, *more)
    kept: dict[Path, bytes] = {}
    for shards_before_the_kill in (1, 5):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        ) as process:
            _wait_for(
                lambda n=shards_before_the_kill: len(list(killed.glob("train/*.json"))) >= n,
                process,
            )
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        kept |= {path: path.read_bytes() for path in killed.glob("train/shard-*.parquet")
                 if path.with_suffix(".json").exists()}  # fmt: skip
    _printed(engine, command)
    assert kept
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert inspect.verify(killed) == []
    for path in killed.rglob("*.tmp"):  # of the runs that were killed, but it may be anybody's
        os.utime(path, (0, 0))
    assert "nothing to do" in _printed(engine, command)
    assert not list(killed.rglob("*.tmp"))
    expected, found = all_rows(whole), all_rows(killed)
    assert expected.keys() == found.keys()
    for key, row in expected.items():
        again = found[key]
        assert np.array_equal(row.tokens, again.tokens)
        assert np.array_equal(row.segments, again.segments)
        assert np.abs(row.label_logprobs - again.label_logprobs).max() <= STEP
    assert "nothing to do" in _printed(engine, command)


def test_a_larger_max_tokens_extends_and_another_identity_is_refused_by_name(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=60)
    out = tmp_path / "out"
    words = words_of(tiny_teacher, corpus, out)
    assert dump(*words, "--max-tokens", "500").exit_code == 0
    first = all_rows(out)
    assert dump(*words, "--max-tokens", "1000").exit_code == 0
    second = all_rows(out)
    assert len(second) > len(first)
    for key, row in first.items():
        assert np.array_equal(row.tokens, second[key].tokens)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    for named, *options in (
        ("keep.top_k", "--top-k", "5"),
        ("teacher.dtype", "--dtype", "float32"),
        ("sequence_length", "--sequence-length", "16"),
        ("documents.held_out", "--held-out", "0.2"),
        ("teacher.engine_args", "--engine", "vllm", "--engine-arg", "quantization=fp8"),
    ):
        assert named in refused(dump(*words, *options))
    original = corpus.read_bytes()
    write_corpus(corpus, num_documents=61)
    assert "corpus" in refused(dump(*words))
    shutil.rmtree(out / "tokens")
    assert "tokens_sha256" in refused(dump(*words))
    assert not (out / "tokens").exists()  # or the right corpus would be refused
    corpus.write_bytes(original)
    assert dump(*words, "--max-tokens", "1000").exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}


def test_separate_documents_are_read_by_the_teacher_one_at_a_time(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=60)
    out = tmp_path / "out"
    more = ("--dtype", "float32", "--held-out", "0", "--documents", "separate")
    words = words_of(tiny_teacher, corpus, out, *more)
    planned = dump(*words, "--plan")
    result = dump(*words)
    assert result.exit_code == 0, result.output
    tokenizer = load_tokenizer(tiny_teacher)
    encoder = make_encoder(tokenizer)
    manifest = json.loads((out / "manifest.json").read_text())
    length = manifest["spec"]["sequence_length"]
    expected = []
    for line in corpus.read_text(encoding="utf-8").splitlines():
        tokens = [*encoder.encode(json.loads(line)["text"]).ids, tokenizer.eos_token_id]
        expected += [tokens[s : s + length + 1] for s in range(0, len(tokens) - 1, length)]
    rows = list(all_rows(out).values())
    assert [row.tokens.tolist() for row in rows] == expected
    for row in rows:
        assert not row.segments.any()
        exact = dense_logprobs(tiny_teacher, row.tokens, TOKENIZER_LENGTH)
        assert largest_error(row, exact) <= BOUND
    positions = sum(len(row.counts) for row in rows)
    assert manifest["splits"]["train"] == {"sequences": len(rows), "positions": positions}
    assert f"{positions:,} counted" in planned.stdout
    assert "documents.joined" in refused(dump(*words, "--documents", "joined"))


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_what_is_finished(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=60)
    out = tmp_path / "out"
    words = words_of(tiny_teacher, corpus, out, "--top-k", "300", "--top-p", "1")
    assert dump(*words, "--max-tokens", "300").exit_code == 0
    finished = {path: path.read_bytes() for path in out.glob("train/shard-000000.*")}
    assert len(finished) == 2
    with largest_file(60_000):
        result = dump(*words, "--max-tokens", "1500")
    assert result.exit_code == 1
    assert "File too large" in the_line(result)
    assert inspect.verify(out) != []  # shards are missing, and said to be
    assert all(path.read_bytes() == content for path, content in finished.items())
    assert dump(*words, "--max-tokens", "1500").exit_code == 0
    assert inspect.verify(out) == []


def test_two_runs_on_one_folder_do_not_meet(tiny_teacher: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=3)
    out = tmp_path / "out"
    out.mkdir()
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        line = refused(dump(*words_of(tiny_teacher, corpus, out)))
    finally:
        os.close(folder)
    assert "another dump-logits" in line


def test_the_resolved_configuration_lies_beside_the_shards(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=5)
    options = tmp_path / "options.yaml"
    options.write_text("top-k: 7\nheld_out: 0\n", encoding="utf-8")
    out = tmp_path / "out"
    words = words_of(tiny_teacher, corpus, out, "--config", str(options))
    assert dump(*words).exit_code == 0
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["spec"]["keep"]["top_k"] == 20  # what is on the command line wins
    assert manifest["spec"]["documents"]["held_out"] == 0.1
    assert {"torch", "transformers"} <= manifest["recorded"][0]["versions"].keys()
    options.write_text("topk: 7\n", encoding="utf-8")
    assert "topk" in refused(dump(*words))
