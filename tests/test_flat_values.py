"""Values without their lists: the same bits as Arrow's, or left to Arrow."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.flat_values import values_in_lists_of
from shards.reader import ShardReader, verify_shard
from shards.schema import ENTRY_COLUMNS, schema, writer_options
from tests.strategies import (
    assert_rows_equal,
    example_row,
    make_spec,
    row_lists,
    write_shard,
)

SCHEMA = schema(ENTRY_COLUMNS)
PATHS = [f"{name}.list.element.list.element" for name in ENTRY_COLUMNS]


def make_table(lists, *, of_logprobs=None):
    """Rows of positions of entries; the log-probabilities in other lists, if asked for."""
    rng = np.random.default_rng(len(lists))
    values = [
        [(-10 * rng.random(len(position))).astype(np.float32).tolist() for position in row]
        for row in (lists if of_logprobs is None else of_logprobs)
    ]
    return pa.table({"ids": lists, "logprobs": values}, schema=SCHEMA)


def write(table, **options):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{**writer_options(SCHEMA), **options})
    return sink.getvalue()


def read(file):
    """What is found in the first row group, and what Arrow finds there."""
    parquet = pq.ParquetFile(pa.BufferReader(file))
    ids, logprobs = (parquet.metadata.row_group(0).column(i) for i in (0, 1))
    column = parquet.read_row_group(0, columns=["logprobs"]).column(0).combine_chunks()
    return values_in_lists_of(ids, logprobs, file), column.flatten().flatten().to_numpy()


def example_lists(num_rows=40, num_positions=30, most=40):
    rng = np.random.default_rng(0)
    return [
        [list(range(rng.integers(0, most + 1))) for _ in range(num_positions)]
        for _ in range(num_rows)
    ]


positions = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=20), min_size=1, max_size=10)


@settings(deadline=None)
@given(st.lists(positions, min_size=1, max_size=6))
def test_any_lists_give_the_bits_that_arrow_gives(lists):
    found, expected = read(write(make_table(lists)))
    assert found.dtype == np.float32
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("page_bytes", [1 << 12, 1 << 16, 4 << 20])
def test_any_number_of_pages_becomes_one_array(page_bytes):
    found, expected = read(write(make_table(example_lists()), data_page_size=page_bytes))
    assert len(found) > 20_000
    assert found.tobytes() == expected.tobytes()
    assert not found.flags.writeable


def test_more_values_than_are_put_together_at_a_time(monkeypatch):
    monkeypatch.setattr("shards.flat_values._VALUES_AT_ONCE", 1000)
    found, expected = read(write(make_table(example_lists())))
    assert found.tobytes() == expected.tobytes()


@settings(deadline=None, max_examples=30)
@given(row_lists())
def test_shards_are_written_so_that_it_works(tmp_path_factory, spec_and_rows):
    spec, rows = spec_and_rows
    path = write_shard(tmp_path_factory.mktemp("any") / "train", rows, spec)
    file = pa.py_buffer(path.read_bytes())
    metadata = pq.read_metadata(path)
    columns = {metadata.row_group(0).column(i).path_in_schema: i for i in range(4)}
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        ids, logprobs = (group.column(columns[path]) for path in PATHS)
        assert values_in_lists_of(ids, logprobs, file) is not None


@pytest.mark.parametrize(
    ("ids", "logprobs"),
    [
        ([[[1, 2], [3]]], [[[1], [2, 3]]]),  # as many entries
        ([[[1, 2], [3]]], [[[1, 2], [3], []]]),
        ([[[1, 2]], [[3]]], [[[1, 2], [3]], []]),
        ([[[1, 2], [3]]], [[[1, 2]]]),
        ([[[]]], [[[], []]]),
    ],
)
def test_other_lists_are_left_to_arrow(ids, logprobs):
    found, _ = read(write(make_table(ids, of_logprobs=logprobs)))
    assert found is None


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "snappy", "compression_level": None},
        {"compression": "none", "compression_level": None},
        {"data_page_version": "2.0"},
        {"use_dictionary": True, "column_encoding": None},
        {"column_encoding": dict.fromkeys(PATHS, "PLAIN")},
        {"column_encoding": {PATHS[0]: "DELTA_BINARY_PACKED", PATHS[1]: "PLAIN"}},
        {"write_statistics": True},  # bytes in the page's header
    ],
    ids=str,
)
def test_pages_of_another_kind_are_left_to_arrow(options):
    found, expected = read(write(make_table(example_lists()), **options))
    assert found is None
    assert len(expected) > 20_000


@pytest.mark.parametrize("more", [1, 20_000], ids=["in the last page", "in more pages"])
def test_lists_that_differ_at_their_end_are_left_to_arrow(more):
    lists = example_lists()
    longer = [*lists[:-1], [*lists[-1][:-1], lists[-1][-1] + [0] * more]]
    assert read(write(make_table(lists), data_page_size=1 << 14))[0] is not None
    for ids, logprobs in ((lists, longer), (longer, lists)):
        table = make_table(ids, of_logprobs=logprobs)
        assert read(write(table, data_page_size=1 << 14))[0] is None


@pytest.mark.parametrize(
    "header",
    [b"", b"\x00", b"\x1c" * 5000, b"\x15" + b"\xff" * 40 + b"\x01", b"\x18\x01a", b"\x05"],
    ids=lambda header: header[:4].hex(),
)
@pytest.mark.parametrize("prefix", ["", "1500158004158004"])
def test_headers_that_say_nothing_are_left_to_arrow(prefix, header):
    file = write(make_table(example_lists()))
    parquet = pq.ParquetFile(pa.BufferReader(file))
    ids, logprobs = (parquet.metadata.row_group(0).column(i) for i in (0, 1))
    start = logprobs.data_page_offset
    content = bytes.fromhex(prefix) + header
    end = start + logprobs.total_compressed_size
    damaged = (file.to_pybytes()[:start] + content)[:end].ljust(end, b"\x7c")
    assert values_in_lists_of(ids, logprobs, pa.py_buffer(damaged)) is None


def test_a_shard_that_is_encoded_otherwise_is_read_all_the_same(tmp_path, monkeypatch):
    def other_options(columns):
        return {**writer_options(columns), "data_page_version": "2.0"}

    monkeypatch.setattr("shards.footer.writer_options", other_options)
    rows = [example_row(i, has_mask=True) for i in range(8)]
    spec = make_spec(sequences_per_shard=8, sequences_per_row_group=3, has_mask=True)
    path = write_shard(tmp_path / "train", rows, spec)
    verify_shard(path)
    with ShardReader(path) as reader:
        for i, expected in enumerate(rows):
            assert_rows_equal(reader.row(i), expected)
