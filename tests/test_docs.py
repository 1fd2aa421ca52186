"""What docs/inspecting.md and docs/format.md show works on a dataset, without our code."""

import re
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pytest

from shards.schema import ALL_COLUMNS
from tests.strategies import example_row, make_identity, write_dataset

DOCS = Path(__file__).parent.parent / "docs"


def blocks(language, page="inspecting.md"):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def run(session, folder):
    result = subprocess.run(
        [sys.executable, "-c", session], cwd=folder, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_dataset(tmp_path / "dataset", make_identity(sequences_per_shard=4), train=6)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_pyarrow_session_prints_tokens_labels_and_entries(folder):
    (session,) = blocks("python")
    row = example_row(0)
    lines = run(session, folder)
    assert len(lines) == 3
    for t, line in enumerate(lines):
        assert line.startswith(f"{row.tokens[t]} -> {row.tokens[t + 1]} {row.label_logprobs[t]}")
    first = row.ids[: row.counts[0]].tolist()
    assert all(f"({token}, " in lines[0] for token in first[:5])


def test_the_worked_example_of_the_format_prints_every_position(folder):
    (example,) = blocks("python", "format.md")
    row = example_row(0)
    lines = run(example, folder)
    assert len(lines) == len(row.counts)
    for t, line in enumerate(lines):
        assert line.startswith(f"{t} {row.tokens[t + 1]} {{")
        assert line.endswith(f"}} {row.tail_logmass[t]}")


def test_the_table_of_columns_is_the_schema():
    table = (DOCS / "format.md").read_text().split("### Encoding")[0]
    named = [
        name
        for line in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", line)
    ]
    assert tuple(named) == ALL_COLUMNS


def test_the_first_query_gives_the_means_of_the_dataset(folder):
    ((cross_entropy, entropy, entries),) = duckdb.sql(blocks("sql")[0]).fetchall()
    rows = [example_row(i) for i in range(6)]
    tokens = sum(len(row.counts) for row in rows)
    assert cross_entropy == pytest.approx(sum(row.teacher_nll for row in rows) / tokens, rel=1e-6)
    assert entropy == pytest.approx(sum(row.teacher_entropy for row in rows) / tokens, rel=1e-6)
    assert entries == pytest.approx(sum(len(row.ids) for row in rows) / tokens)


def test_the_second_query_finds_the_worst_predictions(folder):
    found = duckdb.sql(blocks("sql")[1]).fetchall()
    rows = {i: example_row(i) for i in range(6)}
    worst = np.sort(np.concatenate([row.label_logprobs for row in rows.values()]))[:10]
    assert [line[3] for line in found] == worst.tolist()
    for sequence, t, label, label_logprob, expected, probability in found:
        row, position = rows[sequence], t - 1
        assert label == row.tokens[position + 1]
        assert label_logprob == row.label_logprobs[position]
        start = row.counts[:position].sum()
        if row.counts[position]:
            assert expected == row.ids[start]
            assert probability == pytest.approx(float(np.exp(row.logprobs[start])), rel=1e-6)
        else:
            assert expected is None
