"""The columns are what docs/format.md says, and are written the way that was measured best."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.keep import Threshold, Tokens, TopPK
from shards.schema import ALL_COLUMNS, ENTRY_COLUMNS, schema
from tests.strategies import columns_of, example_row, make_spec, write_shard


def specs():
    """A dataset of every set of columns that one can have."""
    found = []
    for has_mask in (False, True):
        found.append(replace(make_spec(has_mask=has_mask), teacher=None, keep=Tokens()))
        for keep in (TopPK(), Threshold()):
            for has_entropy in (False, True):
                found.append(make_spec(keep=keep, has_mask=has_mask, has_entropy=has_entropy))
    return found


@pytest.mark.parametrize("spec", specs())
def test_no_column_is_nullable_at_any_depth(spec):
    for field in schema(spec.columns):
        while True:
            assert not field.nullable
            if not pa.types.is_list(field.type):
                break
            field = field.type.value_field


@pytest.mark.parametrize("spec", specs())
def test_columns_stand_in_the_order_of_all_columns(spec):
    assert list(spec.columns) == [name for name in ALL_COLUMNS if name in spec.columns]
    assert schema(spec.columns).names == list(spec.columns)


def test_some_dataset_has_every_column():
    assert {name for spec in specs() for name in spec.columns} == set(ALL_COLUMNS)


@pytest.mark.parametrize("keep", [TopPK(), Threshold()], ids=["truncated", "sampled"])
def test_encodings_on_disk_are_the_measured_ones(tmp_path, keep):
    spec = make_spec(has_mask=True, keep=keep)
    rows = [example_row(i, **columns_of(spec)) for i in range(3)]
    path = write_shard(tmp_path / "train", rows, spec)
    group = pq.read_metadata(path).row_group(0)
    names = [group.column(i).path_in_schema.split(".")[0] for i in range(group.num_columns)]
    assert names == list(spec.columns)
    for i, name in enumerate(names):
        column = group.column(i)
        assert column.compression == "ZSTD"
        assert not column.has_dictionary_page
        plain = name in ("sequence", "loss_mask")
        assert ("PLAIN" if plain else "BYTE_STREAM_SPLIT") in column.encodings
        assert (column.statistics is not None) == (name == "sequence")


def test_entry_columns_are_columns():
    assert set(ENTRY_COLUMNS) < set(ALL_COLUMNS)
