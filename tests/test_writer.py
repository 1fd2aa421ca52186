"""A shard is published whole or not at all, and nothing that cannot be read back is written."""

import contextlib
import errno
import resource
import signal
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from shards.errors import RunError, ShardError
from shards.reader import verify_shard
from shards.sidecar import Sidecar, sidecar_path
from shards.writer import ShardWriter, shard_name
from tests.strategies import example_row, make_identity, write_shard

IDENTITY = make_identity(sequences_per_shard=8, sequences_per_row_group=3)


def writer(directory, *, shard=0, identity=IDENTITY):
    return ShardWriter(
        directory, shard=shard, split="train", identity=identity, sequences_per_row_group=3
    )


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_publishing_leaves_the_shard_and_its_sidecar_and_nothing_else(tmp_path):
    path = write_shard(tmp_path, [example_row(i) for i in range(8)], IDENTITY)
    assert path == tmp_path / shard_name(0)
    assert names(tmp_path) == ["shard-000000.json", "shard-000000.parquet"]
    verify_shard(path)


def test_the_sidecar_counts_what_was_written(tmp_path):
    rows = [example_row(i, has_mask=True) for i in range(8, 13)]
    with writer(tmp_path, shard=1) as shard:
        shard.write_rows(rows[:3])
        shard.write_rows(rows[3:])
        sidecar = shard.publish()
    path = tmp_path / shard_name(1)
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


def test_without_a_tail_the_kept_mass_is_the_sum_of_the_weights(tmp_path):
    rows = [example_row(0, has_tail=False)]
    path = write_shard(tmp_path, rows, IDENTITY)
    expected = np.exp(rows[0].logprobs).sum()
    assert Sidecar.read(sidecar_path(path)).kept_mass == pytest.approx(expected, rel=1e-5)


def test_a_published_shard_is_never_overwritten(tmp_path):
    path = write_shard(tmp_path, [example_row(0)], IDENTITY)
    before = path.read_bytes(), sidecar_path(path).read_bytes()
    with pytest.raises(ShardError, match="already there"):
        write_shard(tmp_path, [example_row(0), example_row(1)], IDENTITY)
    assert (path.read_bytes(), sidecar_path(path).read_bytes()) == before
    assert names(tmp_path) == ["shard-000000.json", "shard-000000.parquet"]


@pytest.mark.parametrize("left", ["shard-000000.parquet", "shard-000000.json"])
def test_half_of_another_shard_is_neither_completed_nor_overwritten(tmp_path, left):
    (tmp_path / left).write_text("not ours")
    with pytest.raises(ShardError, match=f"{left}: already there"):
        write_shard(tmp_path, [example_row(0)], IDENTITY)
    assert names(tmp_path) == [left]
    assert (tmp_path / left).read_text() == "not ours"


def test_leaving_without_publishing_leaves_nothing(tmp_path):
    with writer(tmp_path) as shard:
        shard.write_rows([example_row(0)])
        assert names(tmp_path) != []
    assert names(tmp_path) == []


def test_an_exception_leaves_nothing_and_is_not_hidden(tmp_path):
    with pytest.raises(KeyboardInterrupt), writer(tmp_path) as shard:  # noqa: PT012
        shard.write_rows([example_row(0)])
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_aborting_twice_or_after_publishing_does_nothing(tmp_path):
    with writer(tmp_path) as shard:
        shard.write_rows([example_row(0)])
        shard.publish()
        shard.abort()
        shard.abort()
    assert names(tmp_path) == ["shard-000000.json", "shard-000000.parquet"]


def test_a_shard_without_rows_cannot_be_published(tmp_path):
    with writer(tmp_path) as shard, pytest.raises(ValueError, match="without rows"):
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
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(tmp_path, size):
    rows = [example_row(0, most_entries=500)]
    with (
        limited_file_size(size),
        pytest.raises(RunError, match="cannot be written: File too large"),
    ):
        write_shard(tmp_path, rows, IDENTITY)
    assert names(tmp_path) == []


def test_a_full_disk_while_publishing_leaves_nothing(tmp_path):
    with writer(tmp_path) as shard:
        shard.write_rows([example_row(0)])
        with limited_file_size(2000), pytest.raises(RunError, match="cannot be written"):
            shard.publish()
    assert names(tmp_path) == []


def test_a_full_disk_at_the_sidecar_leaves_nothing(tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Sidecar, "write", full)
    with pytest.raises(RunError, match="No space left on device; finished shards are kept"):
        write_shard(tmp_path, [example_row(0)], IDENTITY)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "train").write_text("a file")
    with pytest.raises(RunError, match="cannot be written"):
        writer(tmp_path / "train")


def test_sequences_are_consecutive_from_the_shards_first(tmp_path):
    with writer(tmp_path, shard=1) as shard:
        with pytest.raises(ValueError, match="where 8 and following belong"):
            shard.write_rows([example_row(0)])
        with pytest.raises(ValueError, match="where 8 and following belong"):
            shard.write_rows([example_row(8), example_row(10)])
        shard.write_rows([example_row(8), example_row(9), example_row(10)])
        with pytest.raises(ValueError, match="where 11 and following belong"):
            shard.write_rows([example_row(12)])


def test_only_the_last_row_group_is_short_and_none_is_long(tmp_path):
    rows = [example_row(i) for i in range(9)]
    with writer(tmp_path) as shard:
        with pytest.raises(ValueError, match="4 rows in a row group of 3"):
            shard.write_rows(rows[:4])
        shard.write_rows(rows[:3])
        shard.write_rows(rows[3:6])
        with pytest.raises(ValueError, match="more than 8 sequences"):
            shard.write_rows(rows[6:9])
        shard.write_rows(rows[6:7])
        with pytest.raises(ValueError, match="only the last row group"):
            shard.write_rows(rows[7:8])


def test_a_row_group_size_other_than_the_layouts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2 rows per row group"):
        ShardWriter(tmp_path, shard=0, split="a", identity=IDENTITY, sequences_per_row_group=2)


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
        ({"loss_mask": array("?", True)}, "loss_mask is"),
    ],
)
def test_arrays_that_do_not_fit_together_are_a_mistake_of_the_caller(tmp_path, changes, message):
    with writer(tmp_path) as shard, pytest.raises(ValueError, match=message):
        shard.write_rows([broken(**changes)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": array("i4", 0, 1, -1, 0)}, "a token is not valid"),
        ({"tokens": array("i4", 0, 1, 151_936, 0)}, "a token is not valid"),
        ({"ids": array("i4", 0, 151_936)}, "a kept id is not valid"),
        ({"ids": array("i4", 0, -1)}, "a kept id is not valid"),
        ({"logprobs": array("f4", -1, np.nan)}, "a log-probability is not valid"),
        ({"logprobs": array("f4", -1, -np.inf)}, "a log-probability is not valid"),
        ({"logprobs": array("f4", -2, -1)}, "the order of the log-probabilities is not valid"),
        ({"label_logprobs": array("f4", -1, -np.inf, 0)}, "a label's log-probability"),
        ({"tail_logmass": array("f4", -1, np.nan, 0)}, "a tail_logmass is not valid"),
        ({"loss_mask": array("?", False, True, True)}, "an entry where loss_mask is false"),
        ({"teacher_nll": float("nan")}, "teacher_nll is not valid"),
        ({"teacher_entropy": float("inf")}, "teacher_entropy is not valid"),
    ],
)
def test_values_that_no_teacher_can_mean_end_the_run_naming_the_sequence(
    tmp_path, changes, message
):
    with (
        writer(tmp_path, shard=1) as shard,
        pytest.raises(RunError, match=f"sequence 9: {message}"),
    ):
        shard.write_rows(
            [
                replace(broken(), sequence=8, loss_mask=_all_true(changes)),
                replace(broken(**changes), sequence=9),
            ]
        )
    assert names(tmp_path) == []


def _all_true(changes):
    return array("?", True, True, True) if "loss_mask" in changes else None


def test_a_larger_value_at_the_next_position_is_in_order(tmp_path):
    row = broken(counts=array("i4", 1, 0, 1), logprobs=array("f4", -2, -1))
    verify_shard(write_shard(tmp_path, [row], IDENTITY))


def test_rows_of_a_shard_agree_on_their_optional_columns(tmp_path):
    plain, masked = example_row(0), example_row(1, has_mask=True)
    with writer(tmp_path) as shard:
        with pytest.raises(ValueError, match="loss_mask: 1 of 2 rows have it"):
            shard.write_rows([plain, masked])
        shard.write_rows([plain, example_row(1), example_row(2)])
        with pytest.raises(ValueError, match="same optional columns"):
            shard.write_rows([example_row(3, has_mask=True)])


@pytest.mark.parametrize("recorded", [True, False])
def test_rows_have_an_entropy_if_and_only_if_the_identity_says_so(tmp_path, recorded):
    identity = make_identity(has_entropy=recorded)
    with writer(tmp_path, identity=identity) as shard:
        with pytest.raises(ValueError, match="teacher_entropy: 1 of 2 rows have it"):
            shard.write_rows([example_row(0), example_row(1, has_entropy=False)])
        with pytest.raises(ValueError, match="in the rows or in the identity, but not in both"):
            shard.write_rows([example_row(0, has_entropy=not recorded)])
        shard.write_rows([example_row(0, has_entropy=recorded)])
        assert (shard.publish().teacher_entropy is not None) == recorded


def test_a_sequence_of_32k_tokens_is_one_row(tmp_path):
    row = example_row(0, num_tokens=32_769, most_entries=20)
    path = write_shard(tmp_path, [row], IDENTITY)
    verify_shard(path)
    assert pq.read_table(path)["ids"].to_pylist()[0][-1] == row.ids[-row.counts[-1] :].tolist()
