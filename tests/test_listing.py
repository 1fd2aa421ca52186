"""What a listing finds of a split: the files of its shards, whatever else lies beside them."""

import os
import random
import shutil
import tracemalloc

import numpy as np
import pytest

from shards.dataset import Dataset
from shards.errors import ShardError
from shards.folder import listing
from shards.folder.completeness import SomeShards, is_missing, missing_shards
from shards.folder.continuing import create_or_continue
from shards.folder.listing import has_shards, list_shards
from shards.inspect import describe, verify
from shards.layout import Layout
from shards.manifest import SplitSize, load_manifest
from tests.strategies import example_row, make_spec, write_dataset, write_shard

SPEC = make_spec(sequences_per_shard=4, sequences_per_row_group=3)

FOREIGN = (
    "shard-00000.parquet",
    "shard-0000002.json",
    "shard-0000002.parquet",
    "shard-00_002.json",
    "shard-+00002.json",
    "shard- 00002.json",
    "shard-00000٢.json",
    "shard-000002.parquet.bak",
    "shard-000002.json ",
    "shard-000002.jsonl",
    "shard-000002",
    "shard_000002.json",
    "Shard-000002.json",
    "xshard-000002.json",
    ".shard-000002.parquet.0123456789abcdef.tmp",
    "00000002.json",
    "shard-000099.json",
    "notes.txt",
    "x" * 255,
)


def numbers(there):
    return np.flatnonzero(there).tolist()


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()


@pytest.fixture(params=[1, 3, listing._NAMES_AT_ONCE])
def names_at_once(request, monkeypatch):
    monkeypatch.setattr(listing, "_NAMES_AT_ONCE", request.param)


def test_a_folder_that_is_not_there_has_no_shards(tmp_path):
    assert [numbers(there) for there in list_shards(tmp_path / "train", 3)] == [[], []]
    assert not has_shards(tmp_path / "train")


@pytest.mark.usefixtures("names_at_once")
def test_no_other_name_is_taken_for_that_of_a_shard(tmp_path):
    touch(tmp_path, *FOREIGN)
    (tmp_path / os.fsdecode(b"shard-00000\xff.json")).touch()
    assert [numbers(there) for there in list_shards(tmp_path, 10)] == [[], []]
    touch(tmp_path, "shard-000002.parquet", "shard-000009.json", "shard-000010.json")
    assert [numbers(there) for there in list_shards(tmp_path, 10)] == [[2], [9]]
    assert [len(there) for there in list_shards(tmp_path, 0)] == [0, 0]


@pytest.mark.usefixtures("names_at_once")
def test_names_get_longer_beyond_a_million_shards(tmp_path):
    touch(tmp_path, "shard-999999.json", "shard-1000000.json", "shard-1000001.parquet")
    touch(tmp_path, "shard-0999998.json", "shard-01000001.json", "shard-1000002.json")
    parquet, sidecars = list_shards(tmp_path, 1_000_002)
    assert numbers(parquet) == [1_000_001]
    assert numbers(sidecars) == [999_999, 1_000_000]
    assert numbers(list_shards(tmp_path, 1_000_000)[1]) == [999_999]


@pytest.mark.usefixtures("names_at_once")
def test_every_file_of_a_shard_is_found_in_any_order(tmp_path):
    drawn = random.Random(0)
    kinds = ("parquet", "json")
    expected = {kind: sorted(drawn.sample(range(300), 120)) for kind in kinds}
    names = [f"shard-{n:06}.{kind}" for kind in kinds for n in expected[kind]]
    drawn.shuffle(names)
    touch(tmp_path, *names, *FOREIGN[:-4])
    parquet, sidecars = list_shards(tmp_path, 300)
    assert (numbers(parquet), numbers(sidecars)) == (expected["parquet"], expected["json"])


def test_a_folder_has_shards_once_it_has_a_parquet_file(tmp_path):
    touch(tmp_path, "shard-000000.json", ".shard-000000.parquet.0123456789abcdef.tmp")
    assert not has_shards(tmp_path)
    touch(tmp_path, "shard-000000.parquet")
    assert has_shards(tmp_path)


def test_missing_are_holes_half_pairs_and_a_last_shard_that_is_too_short(tmp_path):
    """Shard 1 is a hole, 3 lacks its sidecar, 5 its Parquet file, and 7, the last, a sequence."""
    path = tmp_path / "dataset"
    write_dataset(path, SPEC, train=30)
    folder = path / "train"
    sidecar = (folder / "shard-000003.json").read_bytes()
    for name in ("000001.json", "000001.parquet", "000003.json", "000005.parquet", "000007.json"):
        (folder / f"shard-{name}").unlink()
    (folder / "shard-000007.parquet").unlink()
    write_shard(folder, [example_row(28)], SPEC, shard=7)
    touch(folder, "shard-0000001.json", "shard-0000001.parquet", "shard-000008.json")
    manifest = load_manifest(path)
    expected = [(1, range(4, 8)), (3, range(12, 16)), (5, range(20, 24)), (7, range(28, 30))]
    missing = missing_shards(path, manifest, "train")
    assert list(missing) == expected
    assert len(missing) == 4
    with pytest.raises(ShardError, match=r"shard-000005.json: describes a shard that is missing"):
        is_missing(path, manifest, "train", *expected[2])
    (folder / "shard-000005.json").unlink()
    with pytest.raises(ShardError, match=r"shard-000007.parquet: holds 1 sequences, expected 2"):
        is_missing(path, manifest, "train", *expected[3])
    for kind in ("json", "parquet"):
        (folder / f"shard-000007.{kind}").unlink()
    assert [is_missing(path, manifest, "train", *shard) for shard in expected] == [
        True, False, True, True,
    ]  # fmt: skip
    left = missing_shards(path, manifest, "train")
    assert list(left) == [expected[0], *expected[2:]]
    assert list(left.runs()) == [range(4, 8), range(20, 24), range(28, 30)]
    assert (folder / "shard-000003.json").read_bytes() == sidecar
    description = describe(path)
    assert (description["missing_shards"], description["sequences"]) == (3, 20)
    assert verify(path) == [f"{path}: 3 shards of split train are missing"]


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ([], []),
        ([0], [range(4)]),
        ([4], [range(16, 18)]),
        ([0, 1, 2, 3, 4], [range(18)]),
        ([0, 2, 3], [range(4), range(8, 16)]),
        ([3, 4, 0, 1], [range(12, 18), range(8)]),
        ([2, 1], [range(8, 12), range(4, 8)]),
    ],
)
def test_neighbouring_shards_are_one_run_of_sequences(shards, expected):
    layout = Layout(sequences_per_shard=4, sequences_per_row_group=3)
    some = SomeShards(numbers=np.array(shards, np.int64), layout=layout, num_sequences=18)
    assert list(some.runs()) == expected
    assert [number for number, _ in some] == shards
    assert sum(len(sequences) for _, sequences in some) == sum(map(len, expected))


@pytest.mark.parametrize("kinds", [("json",), ("parquet",), ("json", "parquet")])
def test_a_complete_dataset_notices_a_missing_file_when_it_reads_it(tmp_path, kinds):
    write_dataset(tmp_path, SPEC, train=10)
    for kind in kinds:
        (tmp_path / "train" / f"shard-000001.{kind}").unlink()
    with Dataset.open(tmp_path).split("train") as split:
        assert split.row(0).sequence == 0
        with pytest.raises(ShardError, match=rf"train/shard-000001.{kinds[0]}: "):
            split.row(5)
        assert split.row(9).sequence == 9


def test_a_listing_takes_bytes_per_shard_and_no_python_objects(tmp_path):
    """100,000 shards, a tenth of them there: 1 MB for their numbers and some for names at once."""
    sizes = {"train": SplitSize(sequences=400_000, positions=6_400_000)}
    manifest = create_or_continue(tmp_path, SPEC, sizes, {}, {})
    folder = tmp_path / "train"
    folder.mkdir()
    for number in range(0, 100_000, 10):
        for kind in ("json", "parquet"):
            os.mknod(folder / f"shard-{number:06}.{kind}")
    tracemalloc.start()
    missing = missing_shards(tmp_path, manifest, "train")
    number, sequences = next(iter(missing))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    shutil.rmtree(folder)
    assert (len(missing), number, sequences) == (90_000, 1, range(4, 8))
    assert peak < 6e6
