"""What was written is what is read; whatever else is in the file is refused."""

import json
import os
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from shards.errors import ShardCorruptError, ShardError, ShardFormatError
from shards.files.checksums import chunks_crc32, file_sha256, footer_sha256
from shards.files.sealed import seal
from shards.keep import Threshold
from shards.reader import ShardReader, verify_shard
from shards.schema import schema, writer_options
from shards.sidecar import Sidecar, sidecar_path
from tests.strategies import (
    assert_rows_equal,
    example_row,
    make_spec,
    row_lists,
    write_shard,
)

SPEC = make_spec(sequences_per_shard=8, sequences_per_row_group=3)
MASKED = make_spec(sequences_per_shard=8, sequences_per_row_group=3, has_mask=True)
SAMPLED = make_spec(sequences_per_shard=8, sequences_per_row_group=3, keep=Threshold())


@pytest.fixture
def rows():
    return [example_row(i, has_mask=True) for i in range(8)]


@pytest.fixture
def path(tmp_path, rows):
    return write_shard(tmp_path / "train", rows, MASKED)


def read_all(path):
    with ShardReader(path) as reader:
        return [
            group.row(r)
            for group in map(reader.read_row_group, range(reader.num_row_groups))
            for r in range(group.num_rows)
        ]


@settings(deadline=None, max_examples=60)
@given(row_lists())
def test_any_row_is_read_back_bit_for_bit(tmp_path_factory, spec_and_rows):
    spec, rows = spec_and_rows
    path = write_shard(tmp_path_factory.mktemp("any") / "train", rows, spec)
    verify_shard(path)
    for found, expected in zip(read_all(path), rows, strict=True):
        assert_rows_equal(found, expected)


PER_TOKEN_OR_POSITION = (
    "tokens",
    "segments",
    "label_logprobs",
    "tail_logmass",
    "entropies",
    "loss_mask",
)


@settings(deadline=None, max_examples=30)
@given(row_lists())
def test_plain_pyarrow_reads_every_column_without_our_code(tmp_path_factory, spec_and_rows):
    spec, rows = spec_and_rows
    path = write_shard(tmp_path_factory.mktemp("any") / "train", rows, spec)
    table = pq.read_table(path, page_checksum_verification=True)
    for found, row in zip(table.to_pylist(), rows, strict=True):
        pieces = np.cumsum(row.counts)[:-1]
        assert found["sequence"] == row.sequence
        for name in PER_TOKEN_OR_POSITION:
            expected = getattr(row, name)
            assert found.get(name) == (None if expected is None else expected.tolist())
        for name in ("ids", "logprobs"):
            expected = [piece.tolist() for piece in np.split(getattr(row, name), pieces)]
            assert found[name] == expected
        assert found["positions"] == len(row.tokens) - 1
        assert found["teacher_nll"] == row.teacher_nll
        assert found.get("teacher_entropy") == row.teacher_entropy
        assert list(found) == list(spec.columns)


def test_a_single_row_is_found_in_any_row_group(path, rows):
    with ShardReader(path) as reader:
        assert (reader.num_rows, reader.num_row_groups) == (8, 3)
        for i in (7, 0, 3, 2, 5):
            assert_rows_equal(reader.row(i), rows[i])
        for wrong in (-1, 8):
            with pytest.raises(IndexError):
                reader.row(wrong)
        with pytest.raises(IndexError):
            reader.read_row_group(3)


def test_a_group_is_flat_arrays_with_offsets(path, rows):
    with ShardReader(path) as reader:
        group = reader.read_row_group(2)
    assert group.sequences.tolist() == [6, 7]
    assert group.token_offsets.tolist() == [0, 17, 34]
    assert group.position_offsets.tolist() == [0, 16, 32]
    counts = np.concatenate([row.counts for row in rows[6:]])
    assert np.diff(group.entry_offsets).tolist() == counts.tolist()
    assert group.ids.tolist() == rows[6].ids.tolist() + rows[7].ids.tolist()
    assert group.teacher_nll.tolist() == [row.teacher_nll for row in rows[6:]]


def test_a_group_stays_valid_after_the_reader_is_closed(path, rows):
    with ShardReader(path) as reader:
        group = reader.read_row_group(0)
    path.unlink()
    assert_rows_equal(group.row(1), rows[1])


def test_columns_that_were_not_asked_for_are_none(path, rows):
    with ShardReader(path) as reader:
        group = reader.read_row_group(0, ["tokens"])
        assert group.tokens.tolist() == [t for row in rows[:3] for t in row.tokens.tolist()]
        assert group.position_offsets.tolist() == [0, 16, 32, 48]
        assert group.sequences.tolist() == [0, 1, 2]
        for name in ("ids", "logprobs", "entry_offsets", "segments", "teacher_nll"):
            assert getattr(group, name) is None
        for columns, unread in (
            (["tokens"], "segments"),
            (["segments"], "tokens"),
            (["tokens", "segments", "ids"], "logprobs"),
            (["tokens", "segments", "logprobs"], "ids"),
        ):
            with pytest.raises(ValueError, match=f"'{unread}' of this row group was not read"):
                reader.read_row_group(0, columns).row(0)
        entries = reader.read_row_group(0, ["ids", "logprobs"])
        assert entries.tokens is None
        assert entries.entry_offsets[-1] == len(entries.ids) == len(entries.logprobs)
        lengths = reader.read_row_group(2, ["positions"])
        assert lengths.positions.tolist() == [16, 16]
        assert lengths.tokens is lengths.position_offsets is None


def test_a_column_that_does_not_exist_is_a_mistake_of_the_caller(path):
    with ShardReader(path) as reader, pytest.raises(ValueError, match="logits"):
        reader.read_row_group(0, ["tokens", "logits"])


def test_an_optional_column_that_the_shard_lacks_is_none(tmp_path):
    path = write_shard(tmp_path / "train", [example_row(0, has_tail=False)], SAMPLED)
    with ShardReader(path) as reader:
        group = reader.read_row_group(0, ["tail_logmass", "loss_mask", "tokens"])
    assert group.tail_logmass is None
    assert group.loss_mask is None


def test_large_columns_are_views_of_what_arrow_decoded(path):
    with ShardReader(path) as reader:
        group = reader.read_row_group(0)
    for name in ("ids", "logprobs", "tokens", "label_logprobs"):
        array = getattr(group, name)
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_the_footer_says_what_the_shard_was_made_from(path):
    with ShardReader(path) as reader:
        assert reader.spec == MASKED
    stored = pq.read_metadata(path).metadata[b"logitshards"]
    assert json.loads(stored) == {
        "format_version": 1,
        "shard": 0,
        "split": "train",
        "spec": MASKED.to_json(),
    }


def test_opening_does_not_read_the_columns(path):
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    ShardReader(path).close()
    with pytest.raises(ShardCorruptError, match="the checksum of column"):
        read_all(path)
    with pytest.raises(ShardCorruptError, match="hash of the file"):
        verify_shard(path)


def damage(content, rng):
    """One random change: a byte replaced, a bit flipped, or the end cut off."""
    position = rng.randrange(len(content))
    kind = rng.choice(["byte", "bit", "cut"])
    if kind == "cut":
        return content[:position]
    mask = rng.randrange(1, 256) if kind == "byte" else 1 << rng.randrange(8)
    return content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


@pytest.mark.parametrize("suffix", [".parquet", ".json"])
def test_random_damage_is_refused_or_harmless(path, rows, suffix):
    file = path.with_suffix(suffix)
    intact = file.read_bytes()
    rng = random.Random(0)
    messages = []
    for _ in range(300):
        file.write_bytes(damage(intact, rng))
        try:
            found = read_all(path)
        except ShardError as error:
            messages.append(str(error))
            continue
        for row, expected in zip(found, rows, strict=True):
            assert_rows_equal(row, expected)
    assert len(messages) > 250
    assert all(str(path.with_suffix("")) in message for message in messages)


def test_every_byte_of_the_page_headers_is_guarded(path, rows):
    """Page checksums leave headers out: an altered encoding would give other numbers."""
    intact = path.read_bytes()
    metadata = pq.read_metadata(path)
    for i in range(metadata.num_columns):
        start = metadata.row_group(0).column(i).data_page_offset
        for position in range(start, start + 24):
            for mask in (1, 0x12, 0xFF):
                content = bytearray(intact)
                content[position] ^= mask
                path.write_bytes(content)
                with pytest.raises(ShardCorruptError):
                    read_all(path)


def test_memory_that_runs_out_is_no_damage(path, monkeypatch):
    def fail(*_, **__):
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    with ShardReader(path) as reader:
        monkeypatch.setattr(reader._parquet, "read_row_group", fail)
        with pytest.raises(ShardError, match="not enough memory for row group 0") as found:
            reader.read_row_group(0)
    assert not isinstance(found.value, ShardCorruptError)


def test_a_file_that_grew_or_is_empty_is_refused(path):
    intact = path.read_bytes()
    for content in (b"", intact + b"\0", intact + intact):
        path.write_bytes(content)
        with pytest.raises(ShardCorruptError, match="bytes"):
            ShardReader(path)


def test_a_shard_without_its_sidecar_or_a_sidecar_without_its_shard_is_refused(path):
    sidecar = sidecar_path(path)
    hidden = sidecar.rename(sidecar.with_suffix(".hidden"))
    with pytest.raises(ShardError, match="is not finished"):
        ShardReader(path)
    hidden.rename(sidecar)
    path.unlink()
    with pytest.raises(ShardCorruptError, match="No such file"):
        ShardReader(path)


def test_two_shards_that_exchanged_places_are_refused(path, tmp_path):
    other = write_shard(tmp_path / "train", [example_row(8, has_mask=True)], MASKED, shard=1)
    exchanged = tmp_path / "exchanged"
    os.rename(path, exchanged)
    os.rename(other, path)
    with pytest.raises(ShardCorruptError, match="bytes"):
        ShardReader(path)


def rewrite(path, table, metadata, sidecar_changes=None, **options):
    """Put another Parquet file into a shard's place, with a sidecar that fits its bytes."""
    sidecar = Sidecar.read(sidecar_path(path))
    encoded = {"logitshards": json.dumps(metadata)} if metadata is not None else {}
    options = {"use_dictionary": False, **options}
    pq.write_table(table.replace_schema_metadata(encoded), path, **options)
    content = memoryview(path.read_bytes())
    parquet = pq.read_metadata(path)
    sidecar_path(path).unlink()
    replace(
        sidecar,
        sequences=parquet.num_rows,
        bytes=len(content),
        footer_sha256=footer_sha256(content),
        sha256=file_sha256(content),
        chunks_crc32=chunks_crc32(content, parquet),
        **(sidecar_changes or {}),
    ).write(sidecar_path(path))


def footer(spec=MASKED, **changes):
    return {
        "format_version": 1,
        "shard": 0,
        "split": "train",
        "spec": spec.to_json(),
        **changes,
    }


def test_another_format_version_is_refused(path):
    rewrite(path, pq.read_table(path), footer(format_version=2))
    with pytest.raises(ShardFormatError, match=r"format version 2, this release reads .*1"):
        ShardReader(path)
    text = sidecar_path(path).read_text()
    sidecar_path(path).write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ShardFormatError, match=r"json: format version 2, this release reads .*1"):
        ShardReader(path)


def test_a_parquet_file_of_something_else_is_refused(path):
    rewrite(path, pa.table({"a": [1]}), None)
    with pytest.raises(ShardFormatError, match="not a shard of logitshards"):
        ShardReader(path)
    rewrite(path, pa.table({"a": [1]}), footer())
    with pytest.raises(ShardFormatError, match="columns"):
        ShardReader(path)


def test_a_sidecar_of_another_shard_is_refused(path):
    rewrite(path, pq.read_table(path), footer(shard=5))
    with pytest.raises(ShardCorruptError, match="belongs to another shard"):
        ShardReader(path)


OPTIONAL = {
    "tail_logmass": (replace(MASKED, keep=Threshold()), ["tail_logmass"]),
    "loss_mask": (SPEC, ["loss_mask"]),
    "entropies": (
        make_spec(has_mask=True, has_entropy=False),
        ["entropies", "teacher_entropy"],
    ),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_column_that_the_spec_does_not_have_is_refused(path, name):
    spec, columns = OPTIONAL[name]
    rewrite(path, pq.read_table(path), footer(spec))
    with pytest.raises(ShardFormatError, match=f"has the columns .*{columns[0]}.*, but its footer"):
        ShardReader(path)


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_shard_that_lacks_a_column_of_its_spec_is_refused(path, name):
    _, columns = OPTIONAL[name]
    rewrite(path, pq.read_table(path).drop_columns(columns), footer())
    with pytest.raises(ShardFormatError, match=f"but its footer describes .*{columns[0]}"):
        ShardReader(path)


@pytest.mark.parametrize("column", ["entropies", "teacher_entropy"])
def test_one_column_of_entropies_without_the_other_is_refused(path, column):
    rewrite(path, pq.read_table(path).drop_columns(column), footer())
    with pytest.raises(ShardFormatError, match="has the columns"):
        ShardReader(path)


def test_columns_in_another_order_or_of_another_type_are_refused(path):
    table = pq.read_table(path)
    rewrite(path, table.select(table.column_names[::-1]), footer())
    with pytest.raises(ShardFormatError, match="has the columns"):
        ShardReader(path)
    nullable = table.schema.field("teacher_nll").with_nullable(True)
    index = table.column_names.index("teacher_nll")
    rewrite(path, table.cast(table.schema.set(index, nullable)), footer())
    with pytest.raises(ShardFormatError, match="has the columns"):
        ShardReader(path)
    wide = pa.field("teacher_nll", pa.float64(), nullable=False)
    rewrite(path, table.cast(table.schema.set(index, wide)), footer())
    with pytest.raises(ShardFormatError, match="has the columns"):
        ShardReader(path)


def test_without_entropies_everything_else_is_there_and_their_sum_is_null(tmp_path):
    spec = make_spec(has_entropy=False)
    rows = [example_row(i, has_entropy=False) for i in range(4)]
    path = write_shard(tmp_path / "train", rows, spec)
    verify_shard(path)
    for found, expected in zip(read_all(path), rows, strict=True):
        assert_rows_equal(found, expected)
    about = json.loads(sidecar_path(path).read_text())
    assert about["teacher_entropy"] is None
    assert about["teacher_nll"] > 0
    rewrite(path, pq.read_table(path), footer(spec), {"teacher_entropy": 1.0})
    with pytest.raises(
        ShardCorruptError, match=r"teacher_entropy is None, but the sidecar says 1\.0"
    ):
        verify_shard(path)


@pytest.mark.parametrize("key", ["logits", "chunks_sha256"])
def test_a_sidecar_with_a_key_that_is_not_known_is_refused_by_name(path, key):
    file = sidecar_path(path)
    content = json.loads(file.read_text())
    del content["checksum"], content["format_version"]
    file.write_text(seal({**content, key: 1}))
    with pytest.raises(ShardFormatError, match=f"{file.name}: .* unknown key '{key}'"):
        ShardReader(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences": "8"}, "key 'sequences': expected int, found '8'"),
        ({"tokens": True}, "key 'tokens': expected int, found True"),
        ({"teacher_nll": "1.0"}, "key 'teacher_nll': expected float, found '1.0'"),
        ({"chunks_crc32": [[1, "2"]]}, "key 'chunks_crc32.0.1': expected int, found '2'"),
        ({"chunks_crc32": "12"}, "key 'chunks_crc32': expected a list, found '12'"),
    ],
)
def test_a_sidecar_with_a_value_of_another_type_is_refused_by_name(path, changes, message):
    file = sidecar_path(path)
    content = json.loads(file.read_text())
    del content["checksum"], content["format_version"]
    file.write_text(seal({**content, **changes}))
    with pytest.raises(ShardFormatError) as caught:
        ShardReader(path)
    assert message in str(caught.value)


def make_table(**changes):
    values = {
        "sequence": [0],
        "tokens": [[1, 2, 3]],
        "ids": [[[4, 5], [6]]],
        "logprobs": [[[-1.0, -2.0], [-1.0]]],
        "tail_logmass": [[-3.0, -3.0]],
        "label_logprobs": [[-1.0, -1.0]],
        "entropies": [[1.0, 1.0]],
        "segments": [[0, 0, 0]],
        "positions": [2],
        "teacher_nll": [2.0],
        "teacher_entropy": [2.0],
    }
    return pa.table({**values, **changes}, schema=schema(SPEC.columns))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [[1, 2]]}, "differ in length"),
        ({"ids": [[[4, 5]]]}, "differ in length"),
        ({"ids": [[[4], [5, 6]]]}, "lists of ids and logprobs differ in length"),
        ({"segments": [[0, 0]]}, "differ in length"),
        ({"positions": [3]}, "the lists are not as long as positions says"),
        ({"label_logprobs": [[-1.0]]}, "differ in length"),
        ({"entropies": [[1.0]]}, "differ in length"),
        ({"sequence": [3]}, "the sequences are not 0 to 0"),
    ],
)
@pytest.mark.parametrize("encoded", ["by default", "as shards are"])
def test_columns_that_do_not_fit_together_are_refused(path, encoded, changes, message):
    table = make_table(**changes)
    options = writer_options(table.schema) if encoded == "as shards are" else {}
    rewrite(path, table, footer(SPEC), **options)
    with ShardReader(path) as reader, pytest.raises(ShardCorruptError, match=message):
        reader.read_row_group(0)


@pytest.mark.parametrize(
    ("changes", "sidecar_changes", "message"),
    [
        ({"ids": [[[4, 151_936], [6]]]}, {}, "a kept id is not valid"),
        ({"entropies": [[1.0, float("nan")]]}, {}, "sequence 0: entropies is nan"),
        ({}, {"entries": 4}, "entries is 3, but the sidecar says 4"),
        ({}, {"teacher_nll": 2.5}, "teacher_nll is 2.0, but the sidecar says 2.5"),
    ],
)
def test_verifying_checks_values_and_sums(path, changes, sidecar_changes, message):
    totals = {
        "tokens": 2,
        "entries": 3,
        "teacher_nll": 2.0,
        "teacher_entropy": 2.0,
        "kept_mass": 2 - 2 * float(np.exp(-3)),
    }
    rewrite(path, make_table(**changes), footer(SPEC), {**totals, **sidecar_changes})
    assert len(read_all(path)) == 1
    with pytest.raises(ShardCorruptError, match=message):
        verify_shard(path)


def test_a_verified_shard_of_plain_pyarrow_is_fine(path):
    totals = {"tokens": 2, "entries": 3, "teacher_nll": 2.0, "teacher_entropy": 2.0}
    rewrite(path, make_table(), footer(SPEC), {**totals, "kept_mass": 2 - 2 * float(np.exp(-3))})
    verify_shard(path)


@pytest.mark.parametrize("happens", ["is cut", "vanishes"])
def test_a_file_that_changes_under_the_map_is_an_error_and_no_signal(happens, path):
    with ShardReader(path) as reader:
        reader.read_row_group(0)
        if happens == "is cut":
            with path.open("r+b") as file:
                file.truncate(100)
        else:
            path.unlink()
        for read in (partial(reader.read_row_group, 0), reader.verify):
            with pytest.raises(ShardCorruptError, match=rf"{path.name}: damaged"):
                read()
