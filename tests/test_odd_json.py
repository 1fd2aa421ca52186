"""Whatever stands in a JSON file that is read, a command ends with one line and no traceback."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.command_runs import run
from tests.tiny_dataset import make_dataset
from tests.tiny_runs import write_student
from tests.tiny_teacher import write_corpus

ODD = [b"", b"[]", b"null", b"3", b'"x"', b"{", b"{}", b'{"a": NaN}', b"\xff\xfe{}", b"[" * 3000,
       b'{"format_version": "1"}',
       b'{"model": 1, "config": [], "tokens": {}, "splits": 3}']  # fmt: skip
# Every sixth is in the fast tests, all are in the slow ones.
CONTENTS = [
    pytest.param(
        content, id=repr(content[:12]), marks=[] if number % 6 == 0 else [pytest.mark.slow]
    )
    for number, content in enumerate(ODD)
]


@pytest.fixture(scope="module")
def made(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with text, a dump of it that is half tokenised, a dataset, and a finished run."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_teacher, folder / "teacher")
    write_corpus(folder / "text.jsonl", num_documents=10)
    assert run("dump-logits", *dump(folder)).exit_code == 0
    make_dataset(folder / "dataset")
    write_student(folder)
    assert run("train-student", *train(folder)).exit_code == 0
    return folder


def dump(folder: Path) -> list[str]:
    return ["--teacher", str(folder / "teacher"), "--corpus", str(folder / "text.jsonl"),
            "--out", str(folder / "out"), "--engine", "transformers", "--sequence-length", "32",
            "--keep", "top-p-k", "--top-k", "5", "--sequences-per-shard", "4"]  # fmt: skip


def train(folder: Path) -> list[str]:
    return ["--shards", str(folder / "dataset"), "--student", str(folder / "student.json"),
            "--out", str(folder / "run"), "--tokens", "128", "--batch-tokens", "64",
            "--learning-rate", "0.01", "--dtype", "float32"]  # fmt: skip


def check_one_line(name: str, words: list[str], *, may_succeed: bool = False) -> None:
    result = run(name, *words)
    if may_succeed and result.exit_code == 0:
        return
    assert result.exit_code in (1, 2), (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    line = result.stderr.splitlines()[-1]
    # --verify lists its problems as they are, one line each
    assert line.startswith(f"{name}: ") or ("--verify" in words and line.startswith(words[0]))
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr, result.stderr


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


@pytest.mark.parametrize("content", CONTENTS)
def test_files_of_a_teacher(folder: Path, content: bytes) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "special_tokens_map.json", "model.safetensors.index.json"):  # fmt: skip
        file = folder / "teacher" / name
        before = file.read_bytes() if file.exists() else None
        file.write_bytes(content)
        shutil.rmtree(folder / "out", ignore_errors=True)
        check_one_line("dump-logits", dump(folder), may_succeed=True)
        file.unlink()
        if before is not None:
            file.write_bytes(before)


@pytest.mark.parametrize("content", CONTENTS)
def test_files_of_a_dump_and_of_a_dataset(folder: Path, content: bytes) -> None:
    for name in ("manifest.json", "tokens/store.json", "train/shard-000000.json",
                 "tokenizer/tokenizer.json"):  # fmt: skip
        file = folder / "out" / name
        before = file.read_bytes()
        file.write_bytes(content)
        check_one_line("dump-logits", dump(folder), may_succeed="shard" in name)
        if not name.startswith("tokens"):
            check_one_line("inspect-shards", [str(folder / "out"), "--verify"])
            check_one_line("inspect-shards", [str(folder / "out"), "--row", "0"])
        file.write_bytes(before)
    store = folder / "out" / "tokens" / "store.json"
    store.rename(store.with_name("progress.json"))
    store.with_name("progress.json").write_bytes(content)
    check_one_line("dump-logits", dump(folder))


@pytest.mark.parametrize("content", CONTENTS)
def test_files_of_a_run_and_of_a_student(folder: Path, content: bytes) -> None:
    checkpoint = max((folder / "run" / "checkpoints").iterdir())
    for file, remove in (
        (folder / "run" / "run.json", None),
        (folder / "run" / "summary.json", None),
        (folder / "run" / "tasks.json", None),
        (folder / "run" / "metrics.jsonl", folder / "run" / "summary.json"),
        (folder / "run" / "speed.jsonl", folder / "run" / "summary.json"),
        (checkpoint / "progress.json", folder / "run" / "summary.json"),
        (checkpoint / "sha256.json", folder / "run" / "summary.json"),
        (folder / "student.json", folder / "run" / "summary.json"),
    ):
        contents = {path: path.read_bytes() for path in (file, remove) if path and path.exists()}
        if remove is not None:
            remove.unlink()
        file.write_bytes(content)
        words = train(folder)
        if file.name == "student.json":
            words[words.index("--out") + 1] = str(folder / "another")
        check_one_line("train-student", words, may_succeed=True)
        out = str(folder / "report.html")
        check_one_line(
            "train-student report", [str(folder / "run"), "--out", out], may_succeed=True
        )
        file.unlink(missing_ok=True)
        for path, before in contents.items():
            path.write_bytes(before)


@pytest.mark.parametrize("content", CONTENTS)
def test_files_of_a_corpus(folder: Path, content: bytes) -> None:
    (folder / "corpus").mkdir()
    words = dump(folder)
    words[words.index("--corpus") + 1] = str(folder / "corpus")
    words[words.index("--out") + 1] = str(folder / "other")
    for name in ("state.json", "text.json", "text.jsonl"):
        file = folder / "corpus" / name
        file.write_bytes(content)
        if name == "state.json":
            shutil.copy(folder / "text.jsonl", folder / "corpus" / "a.arrow")
        check_one_line("dump-logits", words, may_succeed=False)
        for path in (folder / "corpus").iterdir():
            path.unlink()
