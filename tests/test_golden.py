"""Files that a released format version wrote can be read, with the values that were written."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from shards.dataset import Dataset
from shards.inspect import verify
from shards.manifest import load_manifest
from shards.reader import ShardReader
from shards.schema import ALL_COLUMNS
from tests.golden.make import SPECS

GOLDEN = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/manifest.json"))


def as_json(row):
    """A row as the values in the JSON file beside its dataset."""
    values = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(row).items()
        if value is not None
    }
    values["positions"] = len(row.tokens) - 1
    if "counts" in values:
        pieces = np.cumsum(values.pop("counts"))[:-1]
        for name in ("ids", "logprobs"):
            values[name] = [piece.tolist() for piece in np.split(getattr(row, name), pieces)]
    return values


def test_there_is_a_golden_dataset_of_every_kind_of_this_version():
    assert [path.name for path in GOLDEN] == sorted(SPECS)
    specs = list(SPECS.values())
    assert {name for spec in specs for name in spec.columns} == set(ALL_COLUMNS)
    assert {spec.has_teacher for spec in specs} == {True, False}
    assert {spec.documents.bos for spec in specs} == {"none", "sequence+document"}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_a_golden_dataset_says_what_it_is_and_that_it_is_complete(path):
    manifest = load_manifest(path)
    assert manifest.spec == SPECS[path.name]
    assert manifest.complete
    assert set(manifest.tokenizer_files) == {"tokenizer.json", "tokenizer_config.json"}
    shard = path / "train" / "shard-000001.parquet"
    with ShardReader(shard) as reader:
        assert reader.spec == SPECS[path.name]
    assert pq.read_schema(shard).names == list(manifest.spec.columns)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_a_golden_dataset_still_reads_as_it_was_written(path):
    expected = json.loads(path.with_suffix(".json").read_text())
    dataset = Dataset.open(path)
    assert set(dataset.split_names) == set(expected)
    for name, rows in expected.items():
        with dataset.split(name) as split:
            assert [as_json(row) for row in split.rows()] == rows
    assert verify(path) == []


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_plain_pyarrow_reads_a_golden_dataset_in_the_same_way(path):
    expected = json.loads(path.with_suffix(".json").read_text())
    for name, rows in expected.items():
        shards = sorted((path / name).glob("*.parquet"))
        assert pq.read_table(shards).to_pylist() == rows
