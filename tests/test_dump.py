"""Real passes through the command line: what is on disk is what the teacher says, and stays so."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shards import inspect
from shards.keep import TopPK
from shards.rows import Row
from teacher_dump.engines.options import EngineOptions
from teacher_dump.engines.transformers_engine import TransformersEngine
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.rows import TokenSequence
from teacher_dump.tokenizer import load_tokenizer
from teacher_dump.tokens.encoding import make_encoder
from tests.tiny_teacher import (
    BOUND,
    STEP,
    TAIL_NOISE,
    TOKENIZER_LENGTH,
    all_rows,
    borders_of,
    dense_logprobs,
    dump_command,
    largest_error,
    run_all,
    run_dump,
    write_corpus,
)


@pytest.mark.parametrize("engine", ["vllm", "vllm-logprobs", "transformers"])
def test_float32_rows_equal_the_dense_distribution_over_the_next_token(
    engine: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=40)
    out = tmp_path / "out"
    result = run_dump(
        dump_command(tiny_teacher, corpus, out, "--engine", engine, "--dtype", "float32")
    )
    assert result.returncode == 0, result.stderr
    rows = all_rows(out)
    assert {split for split, _ in rows} == {"train", "validation"}
    for row in rows.values():
        assert row.ids.max() < TOKENIZER_LENGTH  # the padded rows would win every softmax
        exact = dense_logprobs(tiny_teacher, row.tokens, TOKENIZER_LENGTH)
        noise = TAIL_NOISE if engine == "vllm-logprobs" else 0.0
        assert largest_error(row, exact, noise) <= BOUND
        assert row.teacher_nll == pytest.approx(
            -exact[np.arange(len(exact)), row.tokens[1:]].sum(), abs=2e-2
        )
        if engine == "vllm-logprobs":
            assert row.teacher_entropy is None
            assert row.entropies is None
        else:
            entropies = -(np.exp(exact) * exact).sum(1)
            assert np.abs(row.entropies - entropies).max() <= BOUND
            assert (row.entropies % STEP == 0).all()
            assert row.teacher_entropy == pytest.approx(-(np.exp(exact) * exact).sum(), abs=2e-2)
    row = rows["train", 0]
    exact = dense_logprobs(tiny_teacher, row.tokens, TOKENIZER_LENGTH)
    for shift in (-1, 1):  # the test itself must notice an off-by-one
        assert largest_error(row, np.roll(exact, shift, axis=0)) > 10 * BOUND


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_the_real_teacher_in_float32_is_exact_and_in_bfloat16_close(
    dtype: str, smollm2: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(topics["assignment"][:4000], encoding="utf-8")
    out = tmp_path / "out"
    command = dump_command(smollm2, corpus, out, "--dtype", dtype, "--held-out", "0")
    result = run_dump([*command, "--sequence-length", "128", "--max-tokens", "512"])
    assert result.returncode == 0, result.stderr
    rows = all_rows(out)
    assert len(rows) == 4
    errors, divergences = [], []
    for row in rows.values():
        exact = dense_logprobs(smollm2, row.tokens, 49152)
        errors.append(largest_error(row, exact))
        borders = borders_of(row)
        for t in range(len(row.counts)):
            kept = slice(borders[t], borders[t + 1])
            true = exact[t][row.ids[kept]]
            tail = np.logaddexp.reduce(np.delete(exact[t], row.ids[kept]))
            # of true distributions, so never negative: rounded values do not add up to 1
            stored = np.append(row.logprobs[kept], row.tail_logmass[t]).astype(np.float64)
            stored -= np.logaddexp.reduce(stored)
            teacher = np.append(true, tail)
            divergences.append((np.exp(teacher) * (teacher - stored)).sum())
        shifted = np.roll(exact, 1, axis=0)
        wrong = row.label_logprobs - shifted[:, row.tokens[1:]].diagonal()
        assert np.mean(np.abs(wrong)) > 0.5
    divergence = float(np.mean(divergences))
    if dtype == "float32":
        assert max(errors) <= BOUND
        assert 0 <= divergence < STEP**2 / 12  # rounding costs about half of that
    else:
        assert 0 <= divergence < 5e-3


def _sampled(row: Row, log_threshold: float) -> set[tuple[int, int]]:
    """(position, id) of the entries that chance chose."""
    by_chance = row.logprobs <= log_threshold
    where = np.repeat(np.arange(len(row.counts)), row.counts)
    return set(zip(where[by_chance].tolist(), row.ids[by_chance].tolist(), strict=True))


def test_threshold_sampling_is_the_same_on_both_engines_and_true_to_the_teacher(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=40)
    keep = ("--keep", "threshold", "--threshold", "0.01")
    for engine in ("vllm", "transformers"):
        out = tmp_path / engine
        command = dump_command(tiny_teacher, corpus, out, "--engine", engine, keep=keep)
        result = run_dump([*command, "--dtype", "float32"])
        assert result.returncode == 0, result.stderr
        assert "--threshold: 0.00980366" in result.stderr
        assert inspect.verify(out) == []
    log_threshold = -74 * STEP
    rows, others = all_rows(tmp_path / "vllm"), all_rows(tmp_path / "transformers")
    same = different = 0
    excess = []
    for key, row in rows.items():
        exact = dense_logprobs(tiny_teacher, row.tokens, TOKENIZER_LENGTH)
        position = np.repeat(np.arange(len(row.counts)), row.counts)
        true = exact[position, row.ids]
        assert np.abs(row.logprobs - np.maximum(true, log_threshold)).max() <= BOUND
        always = exact > log_threshold + 1e-3
        stored = np.zeros_like(always)
        stored[position, row.ids] = True
        assert stored[always].all()
        expected = np.exp(np.minimum(exact, log_threshold) - log_threshold).sum(1)
        excess.append(np.bincount(position, minlength=len(expected)) - expected)
        here, there = _sampled(row, log_threshold), _sampled(others[key], log_threshold)
        same += len(here & there)
        different += len(here ^ there)
    # of thousands of choices a few differ, where the engines' probabilities do by 1e-6
    assert same > 5000
    assert different < 0.01 * same
    # the number of entries of a position has less than half an entry of deviation
    excess = np.concatenate(excess)
    assert abs(excess.mean()) < 6.5 * 0.5 / np.sqrt(len(excess))
    result = run_dump([*command, "--threshold", "0.02", "--dtype", "float32"])
    assert result.returncode == 2
    assert "keep.threshold" in result.stderr


@pytest.mark.slow
def test_draws_are_the_same_on_both_engines(tiny_teacher: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=40)
    engines = ("vllm", "transformers")
    commands = [
        [*dump_command(tiny_teacher, corpus, tmp_path / engine, keep=("--keep", "draws")),
         *("--engine", engine, "--dtype", "float32")] for engine in engines
    ]  # fmt: skip
    codes, stderr = run_all(commands)
    assert codes == ["0", "0"], stderr
    rows, others = (all_rows(tmp_path / engine) for engine in engines)
    assert rows.keys() == others.keys()
    same = different = 0
    for key, row in rows.items():
        here, there = (
            set(
                zip(
                    np.repeat(np.arange(len(r.counts)), r.counts).tolist(),
                    r.ids.tolist(),
                    np.rint(50 * np.exp(r.logprobs)).tolist(),  # how often it was drawn
                    strict=True,
                )
            )
            for r in (row, others[key])
        )
        same += len(here & there)
        different += len(here ^ there)
    # of thousands of choices a few differ, where the engines' probabilities do by 1e-6
    assert same > 5000
    assert different < 0.01 * same


def test_a_tokenizer_may_be_longer_than_the_vocabulary_of_its_teacher(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    known = 250
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, teacher)
    config = LlamaConfig.from_pretrained(teacher)
    config.vocab_size = known
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.25)
    model.save_pretrained(teacher)
    lines = [" ".join(f"w{(7 * n + k) % (known - 1) + 1}" for k in range(20)) for n in range(30)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    engines = ("vllm", "transformers")
    commands = [
        dump_command(teacher, corpus, tmp_path / engine, "--engine", engine, "--dtype", "float32")
        for engine in engines
    ]
    codes, stderr = run_all(commands)
    assert codes == ["0", "0"], stderr
    for engine in engines:
        for row in all_rows(tmp_path / engine).values():
            assert row.ids.max() < known
            exact = dense_logprobs(teacher, row.tokens, known)
            assert largest_error(row, exact) <= BOUND
    corpus.write_text(json.dumps({"text": f"w1 w2 w{known}"}) + "\n")
    result = run_dump(dump_command(teacher, corpus, tmp_path / "out", "--engine", "transformers"))
    assert result.returncode == 2
    assert f"token {known}, but the teacher knows only {known}" in result.stderr


def test_draws_of_a_continued_dump_are_those_of_an_uninterrupted_one(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=40)
    keep = ("--keep", "draws", "--draws", "30", "--temperature", "2")
    more = ("--engine", "transformers", "--dtype", "float32", "--max-tokens")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, sizes in ((whole, ("1000",)), (parts, ("300", "1000"))):
        for size in sizes:
            command = dump_command(tiny_teacher, corpus, out, *more, size, keep=keep)
            assert run_dump(command).returncode == 0
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
        time.sleep(0.005)


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def test_a_dump_that_was_killed_continues_and_loses_and_repeats_nothing(
    engine: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=400)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--engine", engine, "--dtype", "float32")
    assert run_dump(dump_command(tiny_teacher, corpus, whole, *more)).returncode == 0

    command = dump_command(tiny_teacher, corpus, killed, *more)
    kept: dict[Path, bytes] = {}
    for shards_before_the_kill in (1, 5):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            _wait_for(
                lambda n=shards_before_the_kill: len(list(killed.glob("train/*.json"))) >= n,
                process,
            )
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        kept |= {path: path.read_bytes() for path in killed.glob("train/shard-*.parquet")
                 if path.with_suffix(".json").exists()}  # fmt: skip
    result = run_dump(command)
    assert result.returncode == 0, result.stderr
    assert kept
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert inspect.verify(killed) == []
    for path in killed.rglob("*.tmp"):  # of the runs that were killed, but it may be anybody's
        os.utime(path, (0, 0))
    assert "nothing to do" in run_dump(command).stdout
    assert not list(killed.rglob("*.tmp"))
    expected, found = all_rows(whole), all_rows(killed)
    assert expected.keys() == found.keys()
    for key, row in expected.items():
        again = found[key]
        assert np.array_equal(row.tokens, again.tokens)
        assert np.array_equal(row.segments, again.segments)
        assert np.abs(row.label_logprobs - again.label_logprobs).max() <= STEP
    assert "nothing to do" in run_dump(command).stdout


def test_a_larger_max_tokens_extends_and_another_identity_is_refused_by_name(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=60)
    out = tmp_path / "out"
    command = dump_command(tiny_teacher, corpus, out, "--engine", "transformers")
    assert run_dump([*command, "--max-tokens", "500"]).returncode == 0
    first = all_rows(out)
    assert run_dump([*command, "--max-tokens", "1000"]).returncode == 0
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
        result = run_dump([*command, *options])
        assert result.returncode == 2
        assert named in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    original = corpus.read_bytes()
    write_corpus(corpus, num_documents=61)
    result = run_dump(command)
    assert result.returncode == 2
    assert "corpus" in result.stderr
    shutil.rmtree(out / "tokens")
    result = run_dump(command)
    assert result.returncode == 2
    assert "tokens_sha256" in result.stderr
    assert not (out / "tokens").exists()  # or the right corpus would be refused
    corpus.write_bytes(original)
    assert run_dump([*command, "--max-tokens", "1000"]).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}


def test_separate_documents_are_read_by_the_teacher_one_at_a_time(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=60)
    out = tmp_path / "out"
    command = dump_command(tiny_teacher, corpus, out, "--engine", "transformers")
    command += ["--dtype", "float32", "--held-out", "0", "--documents", "separate"]
    planned = run_dump([*command, "--plan"])
    result = run_dump(command)
    assert result.returncode == 0, result.stderr
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
    result = run_dump([*command, "--documents", "joined"])
    assert result.returncode == 2
    assert "documents.joined" in result.stderr


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_what_is_finished(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=60)
    out = tmp_path / "out"
    command = dump_command(tiny_teacher, corpus, out, "--engine", "transformers")
    command += ["--top-k", "300", "--top-p", "1"]
    assert run_dump([*command, "--max-tokens", "300"]).returncode == 0
    finished = {path: path.read_bytes() for path in out.rglob("shard-*")}
    assert finished

    def limit_file_size() -> None:  # every larger write fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    result = run_dump([*command, "--max-tokens", "1500"], preexec_fn=limit_file_size)
    assert result.returncode == 1, result.stderr
    assert len([line for line in result.stderr.splitlines() if "dump-logits:" in line]) == 1
    assert "Traceback" not in result.stderr
    assert inspect.verify(out) != []  # shards are missing, and said to be
    result = run_dump([*command, "--max-tokens", "1500"])
    assert result.returncode == 0, result.stderr
    assert inspect.verify(out) == []


def test_a_head_that_keeps_the_models_dtype_runs_under_transformers(
    tiny_teacher: Path,
) -> None:
    keep = Selection(TopPK(top_p=0.9, top_k=20, logprob_step=STEP), TOKENIZER_LENGTH)
    tokens = np.arange(1, 9, dtype=np.int32)
    sequence = TokenSequence(split="train", number=0, tokens=tokens, segments=tokens * 0)
    engine = TransformersEngine(
        EngineOptions(
            teacher_folder=tiny_teacher,
            architecture="LlamaForCausalLM",
            dtype="bfloat16",
            head_dtype="model",
            sequence_length=len(tokens),
            selection=keep,
        )
    )
    ((_, selected),) = engine.score([sequence])
    exact = dense_logprobs(tiny_teacher, tokens, TOKENIZER_LENGTH)
    wanted = exact[np.arange(len(exact)), tokens[1:]]
    assert np.abs(selected.label_logprobs - wanted).max() < 0.2


def test_two_runs_on_one_folder_do_not_meet(tiny_teacher: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=3)
    out = tmp_path / "out"
    out.mkdir()
    import fcntl

    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        result = run_dump(dump_command(tiny_teacher, corpus, out, "--engine", "transformers"))
    finally:
        os.close(folder)
    assert result.returncode == 2
    assert "another dump-logits" in result.stderr


def test_the_resolved_configuration_lies_beside_the_shards(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=5)
    options = tmp_path / "options.yaml"
    options.write_text("top-k: 7\nheld_out: 0\n", encoding="utf-8")
    out = tmp_path / "out"
    command = dump_command(tiny_teacher, corpus, out, "--engine", "transformers")
    assert run_dump([*command, "--config", str(options)]).returncode == 0
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["spec"]["keep"]["top_k"] == 20  # what is on the command line wins
    assert manifest["spec"]["documents"]["held_out"] == 0.1
    assert {"torch", "transformers"} <= manifest["recorded"][0]["versions"].keys()
    options.write_text("topk: 7\n", encoding="utf-8")
    result = run_dump([*command, "--config", str(options)])
    assert result.returncode == 2
    assert "topk" in result.stderr
