"""What the pages about shards show works without our code, and their tables are complete."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import duckdb
import numpy as np
import pytest
from click.testing import CliRunner

from shards.keep import KEEP_METHODS
from shards.schema import ALL_COLUMNS
from shards.spec import BOS_MODES, DatasetSpec, Documents, Tokenizer, TrainingRun
from tests.command_runs import COMMANDS
from tests.strategies import example_row, make_spec, write_dataset

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
    write_dataset(tmp_path / "dataset", make_spec(sequences_per_shard=4), train=6)
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


def test_the_third_query_finds_the_least_certain_positions(folder):
    found = duckdb.sql(blocks("sql")[2]).fetchall()
    rows = {i: example_row(i) for i in range(6)}
    largest = np.sort(np.concatenate([row.entropies for row in rows.values()]))[::-1][:10]
    assert [line[3] for line in found] == largest.tolist()
    for sequence, t, label, entropy in found:
        assert label == rows[sequence].tokens[t]
        assert entropy == rows[sequence].entropies[t - 1]


def test_the_count_of_positions_with_a_mask_is_the_right_one(tmp_path, monkeypatch):
    write_dataset(tmp_path / "dataset", make_spec(has_mask=True), train=6)
    monkeypatch.chdir(tmp_path)
    (count,) = re.findall(r"`(sum\(list_sum\(.*?)`", (DOCS / "inspecting.md").read_text())
    ((found,),) = duckdb.sql(f"SELECT {count} FROM 'dataset/train/*.parquet'").fetchall()
    assert found == sum(example_row(i, has_mask=True).loss_mask.sum() for i in range(6))


def keys(value):
    """The keys of a JSON object, with those of the objects in it."""
    if not isinstance(value, dict):
        return None
    return {key: keys(part) for key, part in value.items() if key != "engine_args"}


def test_the_example_of_a_spec_has_the_keys_of_a_real_one_in_their_order():
    (example,) = blocks("json", "format.md")
    found, expected = json.loads(example), make_spec().to_json()
    assert json.dumps(keys(found)) == json.dumps(keys(expected))
    assert DatasetSpec.from_json(found, "docs").to_json() == found


def section(title):
    return (DOCS / "format.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def keys_of_table(text):
    """The names in code in the first column of a table."""
    return [
        name
        for cell in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        for name in re.findall(r"`([\w-]+)`", cell)
    ]


def test_the_tables_of_keys_are_those_of_the_files(folder):
    manifest = json.loads((folder / "dataset" / "manifest.json").read_text())
    assert keys_of_table(section("A dataset is a folder")) == list(manifest)
    sidecar = json.loads((folder / "dataset" / "train" / "shard-000000.json").read_text())
    assert sorted(keys_of_table(section("A sidecar makes a shard count"))) == sorted(sidecar)


def test_the_table_of_the_spec_names_every_key_kind_method_and_option():
    table = section("The spec").split("```")[2]
    assert list(dict.fromkeys(keys_of_table(table))) == [
        "teacher",
        "model",
        "training-run",
        "tokenizer",
        "documents",
        "keep",
        *("top-p-k", "draws", "threshold", "tokens"),
        *("layout", "sequence_length", "seed", "tokens_sha256"),
    ]
    for name, kind in KEEP_METHODS.items():
        if kind.__module__ == "shards.keep":
            (row,) = re.findall(rf"^\| `keep`, method `{name}` \| (.*) \|", table, re.MULTILINE)
            options = [field.name for field in fields(kind)]
            assert [text for text in re.findall(r"`(\w+)`", row) if text != "teacher"] == options
    for kind in (Documents, Tokenizer, TrainingRun):
        for field in fields(kind):
            assert f"`{field.name}`" in table


def test_every_bos_mode_is_in_the_docs():
    table = section("A shard is a Parquet file, a row is one sequence").split("### The BOS token")[
        1
    ]
    assert tuple(re.findall(r'^\| `"([\w+]+)"` \|', table, re.MULTILINE)) == BOS_MODES


def test_the_table_of_costs_has_every_column_of_the_demo():
    encoding = (DOCS / "format.md").read_text().split("### What it costs")[1].split("\n## ")[0]
    assert set(keys_of_table(encoding)) == set(make_spec().columns)


def test_the_session_of_the_readme_shows_the_table_that_inspect_shards_prints(folder):
    page = (DOCS.parent / "README.md").read_text()
    shown = page.split("$ inspect-shards dataset\n")[1].split("    ...\n")[0]
    printed = CliRunner().invoke(COMMANDS["inspect-shards"], ["dataset"]).output
    table = printed.split("\n\n")[0]
    assert titles(shown) == titles(table)
    assert len(titles(table)) > 5


def titles(table):
    """What the lines of a table are about, without the line of splits."""
    return [re.split(" {2,}", line.strip())[0] for line in table.splitlines()[1:]]


def test_the_commands_of_the_readme_have_only_options_that_exist():
    page = (DOCS.parent / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    \$ ([\w-]+) (.*)$", page, re.MULTILINE)
    assert {name for name, _ in commands} == {"dump-logits", "train-student", "inspect-shards"}
    for name, words in commands:
        known = {flag for parameter in COMMANDS[name].params for flag in parameter.opts}
        assert set(re.findall(r"(?<!\S)--[\w-]+", words)) <= known
