"""The columns are what docs/format.md says, and are written the way that was measured best."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.schema import ALL_COLUMNS, ENTRY_COLUMNS, is_shard_schema, schema
from tests.strategies import example_row, make_identity, write_shard


@pytest.mark.parametrize("has_tail", [False, True])
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("has_entropy", [False, True])
def test_no_column_is_nullable_at_any_depth(has_tail, has_mask, has_entropy):
    for field in schema(has_tail=has_tail, has_mask=has_mask, has_entropy=has_entropy):
        while True:
            assert not field.nullable
            if not pa.types.is_list(field.type):
                break
            field = field.type.value_field


def test_optional_columns_are_there_when_asked_for():
    optional = {"tail_logmass", "loss_mask", "teacher_entropy"}
    none = schema(has_tail=False, has_mask=False, has_entropy=False)
    assert not optional & set(none.names)
    assert set(none.names) | optional == set(ALL_COLUMNS)


def test_another_columns_type_or_order_is_not_a_shard():
    columns = schema(has_tail=True, has_mask=False, has_entropy=False)
    assert is_shard_schema(columns.with_metadata({"a": "b"}))
    assert not is_shard_schema(columns.remove(0))
    assert not is_shard_schema(columns.set(0, pa.field("sequence", pa.int32(), nullable=False)))
    assert not is_shard_schema(columns.append(pa.field("extra", pa.int32())))


def test_encodings_on_disk_are_the_measured_ones(tmp_path):
    rows = [example_row(i, has_mask=True) for i in range(3)]
    path = write_shard(tmp_path / "train", rows, make_identity())
    group = pq.read_metadata(path).row_group(0)
    for i in range(group.num_columns):
        column = group.column(i)
        assert column.compression == "ZSTD"
        assert not column.has_dictionary_page
        name = column.path_in_schema.split(".")[0]
        plain = name in ("sequence", "loss_mask")
        assert ("PLAIN" if plain else "BYTE_STREAM_SPLIT") in column.encodings
        assert (column.statistics is not None) == (name == "sequence")


def test_entry_columns_are_columns():
    columns = schema(has_tail=False, has_mask=False, has_entropy=False)
    assert set(ENTRY_COLUMNS) < set(columns.names)
