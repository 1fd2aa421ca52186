"""The two halves meet, by the commands: a dump trains a student, for every keep method."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.command_runs import refused
from tests.command_runs import run as run_here
from tests.tiny_teacher import ROOT, write_corpus

# Several commands in one process, one after the other: torch is imported once.
COMMANDS = """
import json, sys
{before}
import cli
for command in json.loads(sys.argv[1]):
    print("$", *command, flush=True)
    try:
        cli.main(command, prog_name="")
    except SystemExit as end:
        if end.code:
            raise
"""

METHODS = {
    "top-p-k": ["--top-k", "20"],
    "draws": ["--draws", "30"],
    "threshold": ["--threshold", "0.02"],
    "odd-top": ["--most", "4"],
    "tokens": [],
}


def run(commands: list[list[str]], before: str = "") -> str:
    result = subprocess.run(
        [sys.executable, "-c", COMMANDS.format(before=before), json.dumps(commands)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, and a student trained on it, of every keep method."""
    folder = tmp_path_factory.mktemp("commands")
    corpus = write_corpus(folder / "text.jsonl", num_documents=60)
    commands = []
    for method, options in METHODS.items():
        tokens_only = method == "tokens"
        source = "--tokenizer" if tokens_only else "--teacher"
        engine = [] if tokens_only else ["--engine", "transformers", "--dtype", "float32"]
        commands += [
            ["dump-logits", source, str(tiny_teacher), "--corpus", str(corpus),
             "--out", str(folder / method), "--sequence-length", "32", "--held-out", "0.2",
             "--sequences-per-shard", "8", "--keep", method, *options, *engine],
            ["train-student", "--shards", str(folder / method), "--student", "demo",
             "--out", str(folder / f"run-{method}"), "--tokens", "512", "--batch-tokens", "128",
             "--dtype", "float32", "--alpha", "0" if tokens_only else "0.5"],
            ["inspect-shards", str(folder / method), "--verify"],
            ["inspect-shards", str(folder / method), "--row", "0"],
        ]  # fmt: skip
    (folder / "said").write_text(run(commands, "import tests.outside_keep_method"))
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_dump_trains_a_student_and_is_sound(folder: Path, method: str) -> None:
    said = (folder / "said").read_text()
    assert f"{folder / method}: sound" in said
    keep = json.loads((folder / method / "manifest.json").read_text())["spec"]["keep"]
    assert keep["method"] == method
    summary = json.loads((folder / f"run-{method}" / "summary.json").read_text())
    assert summary["steps"] == 4
    has_teacher = method != "tokens"
    assert ("validation_teacher_cross_entropy" in summary) == has_teacher
    lines = (folder / f"run-{method}" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if json.loads(line)["kind"] == "train"]
    assert len(steps) == 4
    assert all((step["kd"] > 0) == has_teacher for step in steps)
    columns = pq.read_schema(folder / method / "train" / "shard-000000.parquet").names
    assert ("ids" in columns) == ("entropies" in columns) == has_teacher
    if method == "odd-top":
        assert keep == {"method": "odd-top", "most": 4}
        table = pq.read_table(folder / method / "train" / "shard-000000.parquet")
        ids = table.column("ids").combine_chunks().flatten().flatten().to_pylist()
        assert all(token % 2 for token in ids)


def test_a_dataset_of_an_unknown_method_is_refused_by_its_name(folder: Path) -> None:
    for name, *words in (
        ["inspect-shards", str(folder / "odd-top")],
        ["train-student", "--shards", str(folder / "odd-top"), "--student", "demo", "--out",
         str(folder / "other"), "--tokens", "512"],
    ):  # fmt: skip
        line = refused(run_here(name, *words))
        assert "unknown method 'odd-top', this release knows top-p-k, draws" in line


def test_targets_are_not_taken_from_a_dataset_without_a_teacher(folder: Path) -> None:
    words = ["--shards", str(folder / "tokens"), "--student", "demo", "--out",
             str(folder / "other"), "--tokens", "512"]  # fmt: skip
    line = refused(run_here("train-student", *words))
    assert "holds tokens without a teacher; give --alpha 0" in line
