"""The command line: what commands print, and bad input ends in one line and leaves nothing."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from click.testing import CliRunner

import cli
from tests.tiny_teacher import dump_command, write_corpus


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_command_with_one_line_wherever_it_is(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)

    def receive(*_: object) -> None:
        with contextlib.suppress(Exception):  # as an engine or a task does
            os.kill(os.getpid(), number)
            time.sleep(30)

    monkeypatch.setattr("student_train.run.open_datasets", receive)
    out = str(tmp_path / "out")
    options = ["--shards", out, "--student", "tiny", "--out", out, "--tokens", "9"]
    result = CliRunner().invoke(cli.train_student, options)
    assert result.exit_code == 128 + number
    says = f"train-student: stopped by {number.name}; run the same command again to continue\n"
    assert result.output == says
    assert signal.getsignal(number) == before


def _dump(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.dump_logits, list(options))
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--student-temperature", "0"], "--student-temperature 0.0: expected a value in [0.01"),
        (
            ["--student-temperature", "2", "--tail", "bucket"],
            "--tail bucket: the mass that was not kept",
        ),
        (["--adaptive-temperature", "ada"], "--adaptive-temperature ada: expected normkd, wttm,"),
        (["--adaptive-temperature", "wttm"], "needs a --temperature above 1, not 1.0"),
        (["--weights", "0.7,0.3"], "--weights: 2 values for 1 --shards; expected one for each"),
    ],
)
def test_bad_options_of_training_end_in_one_line(
    more: list[str], says: str, tmp_path: Path
) -> None:
    given = ["--shards", str(tmp_path), "--student", "demo", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.train_student, [*given, "--tokens", "1", *more])
    assert result.exit_code == 2
    assert says in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "weights"), [("weights: [3, 0]", (3, 0)), ("weights: 2,0.5", (2, 0.5))]
)
def test_several_datasets_may_be_in_a_configuration_file(
    text: str, weights: tuple[float, ...], tmp_path: Path
) -> None:
    options = tmp_path / "options.yaml"
    options.write_text(f"shards: [one, other]\n{text}\nstudent: demo\n", encoding="utf-8")
    command = ["--config", str(options), "--out", "out", "--tokens", "1"]
    context = cli.train_student.make_context("train-student", list(command))
    assert context.params["shards"] == (Path("one"), Path("other"))
    assert context.params["weights"] == weights


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    command = ["--shards", "one", "--student", "demo", "--out", "out", "--tokens", "1"]
    result = CliRunner().invoke(cli.train_student, [*command, "--weights", "much,little"])
    assert result.exit_code == 2
    assert result.output == "train-student: --weights much,little: not a valid number\n"


def _options(teacher: Path, corpus: Path, out: Path, *more: str) -> list[str]:
    words = dump_command(teacher, corpus, out, "--engine", "transformers", *more)
    return words[3:]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--top-p", "0"], "--top-p 0.0: expected a value in (0, 1]"),
        (["--top-p", "1.5"], "--top-p 1.5"),
        (["--top-k", "302"], "--top-k 302: the tokenizer has only 301"),
        (["--sequence-length", "65"], "--sequence-length 65"),
        (["--keep", "everything"], "--keep everything: expected top-p-k, draws, threshold"),
        (["--keep", "threshold"], "--top-k: not an option of --keep threshold"),
        (["--draws", "50"], "--draws: not an option of --keep top-p-k"),
        (["--temperature", "2"], "which stores probabilities at temperature 1; train-student"),
        (["--engine", "magic"], "expected vllm, vllm-logprobs or transformers"),
        (["--held-out", "1"], "--held-out 1.0"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--text-key", "body"], "corpus.jsonl:1: no key 'body', found 'text'"),
        (["--engine-arg", "a={b"], "--engine-arg a={b: not a JSON value"),
        (["--engine-arg", "day=2026-01-01"], "--engine-arg day=2026-01-01: not a JSON value"),
        (["--engine-arg", "max_num_seqs=4"], "--engine-arg: --engine transformers takes none"),
        (["--bos", "document"], "--bos document: the tokenizer has no beginning-of-sequence token"),
        (["--token-key", "text"], "--token-key text: names a column of .parquet and .arrow files"),
        (["--mask-key", "mask"], "--mask-key: needs --token-key"),
        (["--token-dtype", "int8"], "--token-dtype int8: expected uint16, "),
        (["--weights", "0"], "--weights 0.0: expected a value in (0, 1000]"),
        (["--weights", "1,2"], "--weights: 2 values for 1 --corpus"),
        (["--no-eos", "--eos-token", "w1"], "--eos-token w1: contradicts --no-eos"),
        (["--tokenizer", "x"], "--tokenizer x: "),
    ],
)
def test_bad_options_end_in_one_line_and_leave_nothing(
    more: list[str], says: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=20)
    out = tmp_path / "out"
    code, output = _dump(*_options(tiny_teacher, corpus, out, *more))
    assert code == 2
    assert says in output
    assert len(output.strip().splitlines()) == 1
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["draws", "--draws", "0"], "--draws 0: expected a number from 1 to 65536"),
        (["draws", "--threshold", "0.1"], "--threshold: not an option of --keep draws"),
        (["threshold", "--threshold", "0.0009"], "--threshold 0.0009: expected a value in"),
        (["threshold", "--threshold", "1.1"], "--threshold 1.1: expected a value in"),
        (["threshold", "--temperature", "0"], "--temperature 0.0: expected a value in"),
        (["threshold", "--draws", "50"], "--draws: not an option of --keep threshold"),
    ],
)
def test_bad_options_of_sampling_end_in_one_line_and_leave_nothing(
    more: list[str], says: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=20)
    out = tmp_path / "out"
    code, output = _dump(*dump_command(tiny_teacher, corpus, out, keep=("--keep", *more))[3:])
    assert code == 2
    assert says in output
    assert len(output.strip().splitlines()) == 1
    assert not out.exists()


# Frames of whole lines: one that is cut off ends like a file that is whole.
TWO_FRAMES = b"".join(
    zstandard.compress(b"".join(b'{"text": "w%d"}\n' % number for number in part))
    for part in (range(1, 100), range(100, 199))
)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.jsonl", None, "missing.jsonl: no such corpus file"),
        ("empty.jsonl", b"", "leaves nothing to train on"),
        (
            "broken.jsonl",
            b'{"text": "w1 w2"}\n{"text": "w3\n',
            "broken.jsonl:2: not a line of JSON",
        ),
        ("list.jsonl", b"[1]\n", "list.jsonl:1: expected an object"),
        ("number.jsonl", b'{"text": 3}\n', "number.jsonl:1: 'text' is int"),
        ("half.jsonl", b'{"text": "w1 \\ud83d"}\n', "half.jsonl:1: 'text' is not Unicode text"),
        ("latin.txt", b"caf\xe9", "latin.txt: not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "w1"}\n' * 99, mtime=0)[:-9], "cut.jsonl.gz"),
        ("cut.jsonl.zst", zstandard.compress(b'{"text": "w1"}\n' * 99)[:-4], "cut.jsonl.zst"),
        ("cut-between-lines.jsonl.zst", TWO_FRAMES[: len(TWO_FRAMES) - 9], "Truncated"),
        ("bad.jsonl.zst", TWO_FRAMES[:9] + b"?" + TWO_FRAMES[10:], "bad.jsonl.zst"),
        (
            "bad.jsonl.gz",
            gzip.compress(b'{"text": "w1"}\n' * 99, mtime=0)[:20] + b"????",
            "bad.jsonl.gz",
        ),
        ("not.parquet", b"PAR1 nothing PAR1", "not.parquet: not a Parquet file"),
        ("corpus.doc", b"text", "not a kind of corpus file"),
    ],
)
def test_a_bad_corpus_is_named_with_its_place_and_nothing_is_left(
    name: str, content: bytes | None, says: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / name
    if content is not None:
        corpus.write_bytes(content)
    out = tmp_path / "out"
    code, output = _dump(*_options(tiny_teacher, corpus, out))
    assert code == 2, output
    assert says in output
    assert len(output.strip().splitlines()) == 1
    assert not out.exists()


def test_an_empty_corpus_is_named_where_progress_is_shown_too(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "shards.process.progress.ProgressLine.due", lambda _: True
    )  # as on a terminal
    corpus = tmp_path / "empty.jsonl"
    corpus.write_bytes(b"")
    code, output = _dump(*_options(tiny_teacher, corpus, tmp_path / "out"))
    assert code == 2, output
    assert "leaves nothing to train on" in output


def test_an_unknown_teacher_and_a_foreign_folder_are_refused(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=5)
    code, output = _dump(*_options(tmp_path / "nobody", corpus, tmp_path / "out"))
    assert code == 2
    assert "neither a folder nor available on the hub" in output
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_bytes(b"cat")
    code, output = _dump(*_options(tiny_teacher, corpus, foreign))
    assert code == 2
    assert "cat.jpg but no dataset" in output
    assert [path.name for path in foreign.iterdir()] == ["cat.jpg"]


def test_every_kind_of_corpus_file_gives_the_same_tokens(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    lines = write_corpus(tmp_path / "a.jsonl", num_documents=30)
    texts = [json.loads(line)["text"] for line in lines.read_text().splitlines()]
    whole = lines.read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes(), mtime=0))
    pieces = [b"".join(part) for part in (whole[:7], whole[7:], [])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, pieces)))
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(map(gzip.compress, pieces)))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    hashes = set()
    for number, corpus in enumerate(
        ["a.jsonl", "a.jsonl.gz", "b.jsonl.gz", "a.jsonl.zst", "a.parquet", "folder"]
    ):
        out = tmp_path / f"out{number}"
        code, output = _dump(*_options(tiny_teacher, tmp_path / corpus, out, "--max-tokens", "40"))
        assert code == 0, output
        hashes.add(json.loads((out / "manifest.json").read_text())["spec"]["tokens_sha256"])
    assert len(hashes) == 1


def test_inspect_shows_figures_rows_and_a_sound_dataset(tiny_teacher: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=30)
    out = tmp_path / "out"
    code, output = _dump(*_options(tiny_teacher, corpus, out))
    assert code == 0, output
    run = CliRunner().invoke
    figures = json.loads(run(cli.inspect_shards, [str(out), "--json"]).output)
    assert {"sequences", "tokens", "entries", "bytes", "teacher_cross_entropy"} <= figures.keys()
    assert "bytes per token by column" in run(cli.inspect_shards, [str(out)]).output
    shard = min(out.glob("train/*.parquet"))
    shown = run(cli.inspect_shards, [str(out), "--row", "0"]).output
    assert "leading predictions" in shown
    assert "'w" in shown
    assert run(cli.inspect_shards, [str(out), "--verify"]).output.strip() == f"{out}: sound"
    for options in (["--row", "0", "--verify"], ["--row", "0", "--json"], ["--split", "train"]):
        result = run(cli.inspect_shards, [str(out), *options])
        assert result.exit_code == 2
        assert "--row" in result.output
    shown = run(cli.inspect_shards, [str(shard), "--row", "1"]).output
    assert shown.startswith("sequence 1: ")
    result = run(cli.inspect_shards, [str(out), "--row", "10000"])
    assert result.exit_code == 2
    assert f"--row 10000: {out} train has sequences 0 to" in result.output
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    result = run(cli.inspect_shards, [str(out), "--verify"])
    assert result.exit_code == 1
    assert shard.name in result.output
    result = run(cli.inspect_shards, [str(tmp_path)])
    assert result.exit_code == 2
    assert "not a dataset" in result.output
