"""A shard is published whole or not at all, and nothing that cannot be read back is written."""

import contextlib
import errno
import resource
import signal
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from shards.errors import RunError, ShardCorruptError, ShardError
from shards.keep import Threshold, Tokens
from shards.reader import verify_shard
from shards.rows import Row
from shards.sidecar import Sidecar, sidecar_path
from shards.writer import ShardWriter, shard_name
from tests.strategies import columns_of, example_row, make_spec, write_shard

SPEC = make_spec(sequences_per_shard=8, sequences_per_row_group=3)
MASKED = make_spec(sequences_per_shard=8, sequences_per_row_group=3, has_mask=True)
SAMPLED = make_spec(sequences_per_shard=8, sequences_per_row_group=3, keep=Threshold())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train").mkdir()
    return tmp_path / "train"


def writer(directory, *, shard=0, spec=SPEC):
    return ShardWriter(directory, shard=shard, split="train", spec=spec)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_publishing_leaves_the_shard_and_its_sidecar_and_nothing_else(folder):
    path = write_shard(folder, [example_row(i) for i in range(8)], SPEC)
    assert path == folder / shard_name(0)
    assert names(folder) == ["shard-000000.json", "shard-000000.parquet"]
    verify_shard(path)


def test_the_sidecar_counts_what_was_written(folder):
    rows = [example_row(i, has_mask=True) for i in range(8, 13)]
    with writer(folder, shard=1, spec=MASKED) as shard:
        shard.write_rows(rows[:3])
        shard.write_rows(rows[3:])
        sidecar = shard.publish()
    path = folder / shard_name(1)
    assert sidecar == Sidecar.read(sidecar_path(path))
    assert (sidecar.shard, sidecar.split, sidecar.first_sequence) == (1, "train", 8)
    assert sidecar.sequences == 5
    assert sidecar.tokens == sum(row.loss_mask.sum() for row in rows)
    assert sidecar.entries == sum(len(row.ids) for row in rows)
    assert sidecar.bytes == path.stat().st_size
    assert sidecar.teacher_nll == pytest.approx(sum(row.teacher_nll for row in rows))
    assert sidecar.teacher_entropy == pytest.approx(sum(row.teacher_entropy for row in rows))
    kept = sum((1 - np.exp(row.tail_logmass[row.loss_mask])).sum() for row in rows)
    assert sidecar.kept_mass == pytest.approx(kept, rel=1e-5)


def test_without_a_tail_the_kept_mass_is_the_sum_of_the_weights(folder):
    rows = [example_row(0, has_tail=False)]
    path = write_shard(folder, rows, SAMPLED)
    expected = np.exp(rows[0].logprobs).sum()
    assert Sidecar.read(sidecar_path(path)).kept_mass == pytest.approx(expected, rel=1e-5)


def test_a_shard_that_another_writer_has_published_is_taken_and_never_overwritten(folder):
    rows = [example_row(0), example_row(1)]
    path = write_shard(folder, rows, SPEC)
    before = path.read_bytes(), sidecar_path(path).read_bytes()
    inodes = path.stat().st_ino, sidecar_path(path).stat().st_ino
    other = [replace(row, tokens=row.tokens[::-1].copy()) for row in rows]
    with writer(folder) as shard:
        shard.write_rows(other)
        assert shard.publish() == Sidecar.read(sidecar_path(path))
    assert (path.read_bytes(), sidecar_path(path).read_bytes()) == before
    assert (path.stat().st_ino, sidecar_path(path).stat().st_ino) == inodes
    assert names(folder) == ["shard-000000.json", "shard-000000.parquet"]


def test_a_published_shard_of_another_number_of_sequences_is_an_error(folder):
    path = write_shard(folder, [example_row(0)], SPEC)
    before = path.read_bytes(), sidecar_path(path).read_bytes()
    with pytest.raises(ShardCorruptError, match="holds 1 sequences, expected 2; delete it"):
        write_shard(folder, [example_row(0), example_row(1)], SPEC)
    assert (path.read_bytes(), sidecar_path(path).read_bytes()) == before
    assert names(folder) == ["shard-000000.json", "shard-000000.parquet"]


@pytest.mark.parametrize(
    ("left", "kind", "message"),
    [
        ("shard-000000.parquet", ShardCorruptError, "has no sidecar, and none can be made from it"),
        ("shard-000000.json", ShardError, "describes a shard that is missing; delete this file"),
    ],
)
def test_half_of_another_shard_is_neither_completed_nor_overwritten(folder, left, kind, message):
    (folder / left).write_text("not ours")
    with pytest.raises(kind, match=f"{left}: {message}"):
        write_shard(folder, [example_row(0)], SPEC)
    assert names(folder) == [left]
    assert (folder / left).read_text() == "not ours"


def test_leaving_without_publishing_leaves_nothing(folder):
    with writer(folder) as shard:
        shard.write_rows([example_row(0)])
        assert names(folder) != []
    assert names(folder) == []


def test_an_exception_leaves_nothing_and_is_not_hidden(folder):
    with pytest.raises(KeyboardInterrupt), writer(folder) as shard:  # noqa: PT012
        shard.write_rows([example_row(0)])
        raise KeyboardInterrupt
    assert names(folder) == []


def test_aborting_twice_or_after_publishing_does_nothing(folder):
    with writer(folder) as shard:
        shard.write_rows([example_row(0)])
        shard.publish()
        shard.abort()
        shard.abort()
    assert names(folder) == ["shard-000000.json", "shard-000000.parquet"]


def test_a_shard_without_rows_cannot_be_published(folder):
    with writer(folder) as shard, pytest.raises(ValueError, match="without rows"):
        shard.publish()


@contextlib.contextmanager
def limited_file_size(size):
    """A disk that is full after so many bytes; lifted before pytest writes to a log of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 2000])
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(folder, size):
    rows = [example_row(0, most_entries=500)]
    with (
        limited_file_size(size),
        pytest.raises(RunError, match="cannot be written: File too large"),
    ):
        write_shard(folder, rows, SPEC)
    assert names(folder) == []


def test_a_full_disk_while_publishing_leaves_nothing(folder):
    with writer(folder) as shard:
        shard.write_rows([example_row(0)])
        with limited_file_size(2000), pytest.raises(RunError, match="cannot be written"):
            shard.publish()
    assert names(folder) == []


def test_a_full_disk_at_the_sidecar_leaves_nothing(folder, monkeypatch):
    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Sidecar, "write", full)
    with pytest.raises(RunError, match="No space left on device; finished shards are kept"):
        write_shard(folder, [example_row(0)], SPEC)
    assert names(folder) == []


def test_a_folder_that_cannot_be_made_is_one_line(folder):
    (folder / "train").write_text("a file")
    with pytest.raises(RunError, match="train: cannot be written"):
        writer(folder / "train")


def test_sequences_are_consecutive_from_the_shards_first(folder):
    with writer(folder, shard=1) as shard:
        with pytest.raises(ValueError, match="where 8 and following belong"):
            shard.write_rows([example_row(0)])
        with pytest.raises(ValueError, match="where 8 and following belong"):
            shard.write_rows([example_row(8), example_row(10)])
        shard.write_rows([example_row(8), example_row(9), example_row(10)])
        with pytest.raises(ValueError, match="where 11 and following belong"):
            shard.write_rows([example_row(12)])


def test_only_the_last_row_group_is_short_and_none_is_long(folder):
    rows = [example_row(i) for i in range(9)]
    with writer(folder) as shard:
        with pytest.raises(ValueError, match="4 rows in a row group of 3"):
            shard.write_rows(rows[:4])
        shard.write_rows(rows[:3])
        shard.write_rows(rows[3:6])
        with pytest.raises(ValueError, match="more than 8 sequences"):
            shard.write_rows(rows[6:9])
        shard.write_rows(rows[6:7])
        with pytest.raises(ValueError, match="only the last row group"):
            shard.write_rows(rows[7:8])


def broken(**changes):
    """A row of 4 tokens with 2 entries at its first position, changed."""
    row = example_row(0, num_tokens=4, most_entries=0)
    good = {
        "counts": np.array([2, 0, 0], np.int32),
        "ids": np.array([5, 3], np.int32),
        "logprobs": np.array([-1, -2], np.float32),
    }
    return replace(row, **{**good, **changes})


def array(dtype, *values):
    return np.array(values, dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": array("i4", 1)}, "at least 2"),
        ({"tokens": array("i8", 1, 2, 3, 4)}, "tokens is int64"),
        ({"segments": array("i4", 0, 0, 0)}, "segments is int32"),
        ({"counts": array("i4", 1, 1, 0, 0)}, "counts is"),
        ({"counts": array("i4", 3, -1, 0)}, "negative counts"),
        ({"ids": array("i4", 5)}, "ids is"),
        ({"logprobs": array("f8", -1, -2)}, "logprobs is float64"),
        ({"label_logprobs": array("f4", -1, -1, -1, -1)}, "label_logprobs is"),
        ({"tail_logmass": array("f4", -1)}, "tail_logmass is"),
        ({"entropies": array("f4", 1, 1, 1, 1)}, "entropies is"),
        ({"entropies": array("f8", 1, 1, 1)}, "entropies is float64"),
        ({"loss_mask": array("?", True)}, "loss_mask is"),
    ],
)
def test_arrays_that_do_not_fit_together_are_a_mistake_of_the_caller(folder, changes, message):
    with writer(folder) as shard, pytest.raises(ValueError, match=message):
        shard.write_rows([broken(**changes)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": array("i4", 0, 1, -1, 0)}, "a token is not valid"),
        ({"tokens": array("i4", 0, 1, 151_936, 0)}, "a token is not valid"),
        ({"ids": array("i4", 0, 151_936)}, "a kept id is not valid"),
        ({"ids": array("i4", 0, -1)}, "a kept id is not valid"),
        ({"logprobs": array("f4", -1, -np.inf)}, "logprobs is not valid"),
        ({"logprobs": array("f4", -2, -1)}, "the order of logprobs is not valid"),
        ({"label_logprobs": array("f4", -1, -np.inf, 0)}, "label_logprobs is not valid"),
        ({"tail_logmass": array("f4", -1, np.inf, 0)}, "tail_logmass is not valid"),
        ({"entropies": array("f4", 1, np.inf, 0)}, "entropies is not valid"),
        ({"loss_mask": array("?", False, True, True)}, "an entry where loss_mask is false"),
        ({"teacher_nll": float("-inf")}, "teacher_nll is not valid"),
        ({"teacher_entropy": float("inf")}, "teacher_entropy is not valid"),
    ],
)
def test_values_that_no_teacher_can_mean_end_the_run_naming_the_sequence(folder, changes, message):
    check_refused(folder, changes, f"sequence 9: {message}")


NAN = np.float32("nan")


@pytest.mark.parametrize(
    "changes",
    [
        {"logprobs": array("f4", -1, NAN)},
        {"logprobs": array("f4", NAN, -1)},
        {"label_logprobs": array("f4", -1, NAN, 0)},
        {"tail_logmass": array("f4", -1, NAN, 0)},
        {"entropies": array("f4", 0, 0, NAN)},
        {"teacher_nll": float("nan")},
        {"teacher_entropy": float("nan")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_teacher_that_gave_nan_is_told_so_by_the_column(folder, changes):
    (name,) = changes
    check_refused(folder, changes, f"sequence 9: {name} is nan: the teacher gave no number")


def test_a_teacher_that_gave_nothing_but_nan_is_told_so_where_it_is_clearest(folder):
    changes = {
        "logprobs": array("f4", NAN, NAN),
        "label_logprobs": array("f4", NAN, NAN, NAN),
        "tail_logmass": array("f4", NAN, NAN, NAN),
        "entropies": array("f4", NAN, NAN, NAN),
        "teacher_nll": float("nan"),
        "teacher_entropy": float("nan"),
    }
    check_refused(folder, changes, "sequence 9: label_logprobs is nan: the teacher gave no number")
    del changes["label_logprobs"]
    check_refused(folder, changes, "sequence 9: logprobs is nan: the teacher gave no number")


def check_refused(folder, changes, message):
    """A second row with these changes is refused, and nothing is left."""
    spec = MASKED if "loss_mask" in changes else SPEC
    mask = array("?", True, True, True) if "loss_mask" in changes else None
    rows = [
        replace(broken(), sequence=8, loss_mask=mask),
        replace(broken(**changes), sequence=9),
    ]
    with writer(folder, shard=1, spec=spec) as shard, pytest.raises(RunError) as caught:
        shard.write_rows(rows)
    assert message in str(caught.value)
    assert names(folder) == []


def test_a_larger_value_at_the_next_position_is_in_order(folder):
    row = broken(counts=array("i4", 1, 0, 1), logprobs=array("f4", -2, -1))
    verify_shard(write_shard(folder, [row], SPEC))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("loss_mask", {"loss_mask": np.ones(16, np.bool_)}),
        ("tail_logmass", {"tail_logmass": None}),
        ("label_logprobs", {"label_logprobs": None}),
        ("entropies", {"entropies": None}),
        ("teacher_nll", {"teacher_nll": None}),
        ("teacher_entropy", {"teacher_entropy": None}),
        ("counts", {"counts": None, "ids": None, "logprobs": None}),
    ],
)
def test_rows_of_a_row_group_agree_on_their_optional_columns(folder, name, changes):
    rows = [example_row(0), replace(example_row(1), **changes)]
    with writer(folder) as shard, pytest.raises(ValueError, match=f"{name}: 1 of 2 rows have it"):
        shard.write_rows(rows)


SPECS = {
    "top-p-k": SPEC,
    "masked": MASKED,
    "sampled": SAMPLED,
    "no entropies": make_spec(has_entropy=False),
    "tokens": replace(SPEC, teacher=None, keep=Tokens()),
    "masked tokens": replace(MASKED, teacher=None, keep=Tokens()),
}


def row_of(spec):
    row = example_row(0, **columns_of(spec))
    return row if spec.has_teacher else tokens_of(row)


def tokens_of(row):
    return Row(
        sequence=row.sequence, tokens=row.tokens, segments=row.segments, loss_mask=row.loss_mask
    )


@pytest.mark.parametrize("of_rows", SPECS)
@pytest.mark.parametrize("of_dataset", SPECS)
def test_rows_have_the_columns_of_their_dataset_no_less_and_no_more(folder, of_dataset, of_rows):
    row = row_of(SPECS[of_rows])
    with writer(folder, spec=SPECS[of_dataset]) as shard:
        if of_rows == of_dataset:
            shard.write_rows([row])
            shard.publish()
            return
        with pytest.raises(ValueError, match=r"rows with columns .* expected"):
            shard.write_rows([row])
    assert names(folder) == []


def test_a_shard_that_was_begun_keeps_its_columns(folder):
    with writer(folder) as shard:
        shard.write_rows([example_row(0), example_row(1), example_row(2)])
        with pytest.raises(ValueError, match=r"rows with columns .*loss_mask.* expected"):
            shard.write_rows([example_row(3, has_mask=True)])


@pytest.mark.parametrize("has_entropy", [True, False])
def test_the_sum_of_entropies_is_null_without_the_column(folder, has_entropy):
    with writer(folder, spec=make_spec(has_entropy=has_entropy)) as shard:
        shard.write_rows([example_row(0, has_entropy=has_entropy)])
        assert (shard.publish().teacher_entropy is not None) == has_entropy


def test_tokens_alone_have_neither_entries_nor_sums(folder):
    spec = SPECS["masked tokens"]
    row = row_of(spec)
    path = write_shard(folder, [row], spec)
    verify_shard(path)
    sidecar = Sidecar.read(sidecar_path(path))
    assert (sidecar.sequences, sidecar.tokens, sidecar.entries) == (1, row.loss_mask.sum(), 0)
    assert (sidecar.teacher_nll, sidecar.teacher_entropy, sidecar.kept_mass) == (None, None, None)
    names = ["sequence", "tokens", "segments", "loss_mask", "positions"]
    assert pq.read_table(path).column_names == names


def test_a_sequence_of_32k_tokens_is_one_row(folder):
    row = example_row(0, num_tokens=32_769, most_entries=20)
    path = write_shard(folder, [row], SPEC)
    verify_shard(path)
    assert pq.read_table(path)["ids"].to_pylist()[0][-1] == row.ids[-row.counts[-1] :].tolist()
