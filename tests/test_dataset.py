"""A folder is continued, extended, refused or opened by what is in it, never by guessing."""

import json
import random

import pytest

from shards import dataset as dataset_module
from shards.dataset import (
    Dataset,
    SplitSize,
    check_folder,
    create_or_continue,
    discard_shard,
    load_manifest,
    missing_shards,
)
from shards.durable import temporary_name
from shards.errors import (
    IdentityMismatchError,
    InputError,
    RunError,
    ShardCorruptError,
    ShardError,
    ShardFormatError,
)
from shards.layout import Layout
from tests.strategies import (
    assert_rows_equal,
    example_row,
    make_identity,
    write_dataset,
    write_shard,
)

IDENTITY = make_identity(sequences_per_shard=4, sequences_per_row_group=3)


def sizes(**num_sequences):
    return {
        name: SplitSize(sequences=number, positions=16 * number)
        for name, number in num_sequences.items()
    }


def make(path, recorded=None, **num_sequences):
    return create_or_continue(path, IDENTITY, sizes(**num_sequences), recorded or {"engine": "a"})


def missing(path, split="train"):
    return [number for number, _ in missing_shards(path, load_manifest(path), split)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "dataset"
    write_dataset(path, IDENTITY, train=10, validation=2)
    return path


def test_a_new_folder_gets_a_manifest_and_lacks_every_shard(tmp_path):
    manifest = make(tmp_path / "a" / "b", train=10, validation=0)
    assert load_manifest(tmp_path / "a" / "b") == manifest
    assert manifest.identity == IDENTITY
    assert manifest.splits == sizes(train=10, validation=0)
    assert manifest.recorded == ({"engine": "a"},)
    expected = [(0, range(4)), (1, range(4, 8)), (2, range(8, 10))]
    assert missing_shards(tmp_path / "a" / "b", manifest, "train") == expected
    assert missing_shards(tmp_path / "a" / "b", manifest, "validation") == []


def test_what_was_written_is_what_a_dataset_gives_back(path):
    dataset = Dataset.open(path)
    assert dataset.split_names == ["train", "validation"]
    assert dataset.identity == IDENTITY
    with dataset.split("train") as split:
        assert (split.num_sequences, split.num_positions) == (10, 160)
        for found, i in zip(split.rows(), range(10), strict=True):
            assert_rows_equal(found, example_row(i))
        for i in (9, 0, 4):
            assert_rows_equal(split.row(i), example_row(i))
        assert [sidecar.sequences for sidecar in split.sidecars()] == [4, 4, 2]


def test_row_groups_are_numbered_over_the_whole_split(path):
    with Dataset.open(path).split("train") as split:
        ranges = [split.row_group_range(g) for g in range(split.num_row_groups)]
        assert ranges == [range(3), range(3, 4), range(4, 7), range(7, 8), range(8, 10)]
        for g, sequences in enumerate(ranges):
            group = split.read_row_group(g, ["tokens"])
            assert group.sequences.tolist() == list(sequences)
            assert group.ids is None
        for call in (split.row_group_range, split.read_row_group):
            for wrong in (-1, 5):
                with pytest.raises(IndexError):
                    call(wrong)
        for wrong in (-1, 10):
            with pytest.raises(IndexError):
                split.row(wrong)


@pytest.mark.parametrize("per_shard", [1, 3, 4, 7])
@pytest.mark.parametrize("per_row_group", [1, 2, 4, 9])
def test_the_arithmetic_of_places_agrees_with_counting(per_shard, per_row_group):
    layout = Layout(sequences_per_shard=per_shard, sequences_per_row_group=per_row_group)
    for num_sequences in range(20):
        places, ranges = [], []
        for shard in range(layout.num_shards(num_sequences)):
            sequences = list(layout.shard_range(shard, num_sequences))
            for row_group, first in enumerate(range(0, len(sequences), per_row_group)):
                group = sequences[first : first + per_row_group]
                ranges.append(group)
                places += [(shard, row_group, offset) for offset in range(len(group))]
        assert [layout.locate(i) for i in range(num_sequences)] == places
        assert layout.num_row_groups(num_sequences) == len(ranges)
        for g, expected in enumerate(ranges):
            assert list(layout.row_group_range(g, num_sequences)) == expected


def test_a_layout_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Layout(sequences_per_shard=0, sequences_per_row_group=1)


def test_the_same_command_again_changes_nothing(path):
    before = (path / "manifest.json").read_bytes()
    assert make(path, {"engine": "example"}, train=10, validation=2) == load_manifest(path)
    assert (path / "manifest.json").read_bytes() == before
    assert missing(path) == missing(path, "validation") == []


def test_a_smaller_size_keeps_the_larger_one(path):
    assert make(path, train=3).splits == sizes(train=10, validation=2)
    assert missing(path) == []


def test_a_larger_size_extends_and_the_short_shard_is_written_again(path):
    assert make(path, train=17).splits == sizes(train=17, validation=2)
    assert missing(path) == [2, 3, 4]
    write_dataset(path, IDENTITY, train=17)
    with Dataset.open(path).split("train") as split:
        for found, i in zip(split.rows(), range(17), strict=True):
            assert_rows_equal(found, example_row(i))


def test_extending_a_full_last_shard_keeps_it(tmp_path):
    write_dataset(tmp_path, IDENTITY, train=8)
    before = (tmp_path / "train" / "shard-000001.parquet").stat()
    make(tmp_path, train=9)
    assert missing(tmp_path) == [2]
    assert (tmp_path / "train" / "shard-000001.parquet").stat() == before


def test_an_interrupted_extension_leaves_no_short_shard_in_the_middle(path, monkeypatch):
    def fail(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shards.durable.replace", fail)
    with pytest.raises(RunError, match=r"manifest.json: cannot be written: No space left"):
        make(path, train=17)
    monkeypatch.undo()
    assert load_manifest(path).splits == sizes(train=10, validation=2)
    assert missing(path) == [2]
    write_dataset(path, IDENTITY, train=17)
    assert len(list(Dataset.open(path).split("train").sidecars())) == 5


def test_a_last_shard_that_is_too_short_does_not_count(path):
    discard_shard(path, "train", 2)
    write_shard(path / "train", [example_row(8)], IDENTITY, shard=2)
    assert missing(path) == [2]


def test_a_shard_counts_once_its_sidecar_is_there(path):
    sidecar = path / "train" / "shard-000001.json"
    hidden = sidecar.rename(path / "train" / "hidden")
    assert missing(path) == [1]
    hidden.rename(sidecar)
    assert missing(path) == []
    (path / "train" / "shard-000001.parquet").unlink()
    assert missing(path) == [1]


def test_a_run_killed_between_shard_and_sidecar_is_repaired_by_discarding(path):
    (path / "train" / "shard-000001.json").unlink()
    write_dataset(path, IDENTITY, train=10)
    with Dataset.open(path).split("train") as split:
        assert_rows_equal(split.row(5), example_row(5))


def test_discarding_removes_the_shard_and_temporary_files_of_it_only(path):
    folder = path / "train"
    for name in ("shard-000001.parquet", "shard-000001.json", "shard-000002.parquet"):
        temporary_name(folder / name).touch()
    discard_shard(path, "train", 1)
    left = sorted(file.name for file in folder.iterdir())
    assert left[0].startswith(".shard-000002.parquet.")
    assert left[1:] == [
        "shard-000000.json",
        "shard-000000.parquet",
        "shard-000002.json",
        "shard-000002.parquet",
    ]
    discard_shard(path, "train", 1)
    discard_shard(path, "no-such-split", 0)


def test_another_identity_is_refused_naming_every_difference(path):
    other = {**IDENTITY, "seed": 7, "keep": {**IDENTITY["keep"], "top_k": 50}}
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(IdentityMismatchError) as caught:
        create_or_continue(path, other, sizes(train=20), {})
    assert "keep.top_k: 50 here, 100 there; seed: 7 here, 0 there" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (path / "manifest.json").read_bytes() == before
    assert missing(path) == []


def test_every_different_set_up_is_recorded_once_and_not_compared(path):
    make(path, {"engine": "b"}, train=10)
    manifest = make(path, {"engine": "b"}, train=10)
    assert manifest.recorded == ({"engine": "example"}, {"engine": "b"})
    assert load_manifest(path) == manifest


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds something else \(thesis.tex\)"):
        make(tmp_path, train=1)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="a file, where a folder"):
        check_folder(tmp_path / "thesis.tex")


def test_a_folder_that_was_only_prepared_is_taken(tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokenizer").mkdir()
    temporary_name(tmp_path / "manifest.json").touch()
    make(tmp_path, train=1)
    assert missing(tmp_path) == [0]


def test_two_runs_that_start_at_once_share_the_first_manifest(tmp_path, monkeypatch):
    from shards import durable

    write_new = durable.write_new

    def lose_the_race(path, text):
        write_new(path, text)
        write_new(path, text)

    monkeypatch.setattr(durable, "write_new", lose_the_race)
    manifest = make(tmp_path, train=5)
    assert manifest == load_manifest(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_a_folder_without_a_manifest_is_no_dataset(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ShardFormatError, match="not a dataset"):
            Dataset.open(path)


def test_an_unknown_format_version_is_refused(path):
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(ShardFormatError, match="format version 9, this release reads version 1"):
        Dataset.open(path)


def test_random_damage_to_the_manifest_is_refused_or_harmless(path):
    intact = load_manifest(path)
    file = path / "manifest.json"
    content = file.read_bytes()
    rng = random.Random(1)
    num_refused = 0
    for _ in range(300):
        position = rng.randrange(len(content))
        flipped = bytes([content[position] ^ rng.randrange(1, 256)])
        end = content[position + 1 :] if rng.random() < 0.8 else b""
        file.write_bytes(content[:position] + flipped + end)
        try:
            assert load_manifest(path) == intact
        except (ShardCorruptError, ShardFormatError):
            num_refused += 1
    assert num_refused > 200


def test_white_space_and_key_order_of_a_manifest_are_free(path):
    intact = load_manifest(path)
    file = path / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(content.items()))))
    assert load_manifest(path) == intact


def test_an_incomplete_dataset_says_what_is_missing_and_what_to_do(path):
    discard_shard(path, "train", 0)
    discard_shard(path, "train", 2)
    with pytest.raises(ShardError, match=r"2 of 3 shards of split train .*same dump-logits"):
        Dataset.open(path)


def test_an_empty_split_is_not_there(tmp_path):
    write_dataset(tmp_path, IDENTITY, train=3, validation=0)
    dataset = Dataset.open(tmp_path)
    assert dataset.split_names == ["train"]
    for name in ("validation", "test"):
        with pytest.raises(ShardError, match=f"no split {name}; there is train"):
            dataset.split(name)


def test_a_shard_of_another_dataset_is_refused(path, tmp_path):
    other = {**IDENTITY, "seed": 1}
    discard_shard(path, "train", 1)
    write_shard(path / "train", [example_row(i) for i in range(4, 8)], other, shard=1)
    with (
        Dataset.open(path).split("train") as split,
        pytest.raises(IdentityMismatchError, match="seed: 0 here, 1 there"),
    ):
        split.row(5)


def test_a_shard_in_another_place_is_refused(path):
    for suffix in ("json", "parquet"):
        (path / "train" / f"shard-000000.{suffix}").replace(
            path / "train" / f"shard-000001.{suffix}"
        )
    manifest = load_manifest(path)
    split = dataset_module.Split(path / "train", manifest.splits["train"], manifest.identity)
    with split, pytest.raises(ShardCorruptError, match="holds 4 sequences of split train from 0"):
        split.row(5)


def test_a_short_shard_in_the_middle_is_refused(path):
    discard_shard(path, "train", 1)
    write_shard(path / "train", [example_row(4)], IDENTITY, shard=1)
    with (
        Dataset.open(path).split("train") as split,
        pytest.raises(ShardCorruptError, match="holds 1 sequences"),
    ):
        split.row(4)


def test_open_readers_are_bounded_and_reopen(tmp_path, monkeypatch):
    identity = make_identity(sequences_per_shard=1, sequences_per_row_group=1)
    write_dataset(tmp_path, identity, train=6)
    monkeypatch.setattr(dataset_module, "_MAX_OPEN_READERS", 2)
    opened = []

    class CountingReader(dataset_module.ShardReader):
        def __init__(self, path):
            super().__init__(path)
            opened.append(self)

        def close(self):
            super().close()
            opened.remove(self)

    monkeypatch.setattr(dataset_module, "ShardReader", CountingReader)
    with Dataset.open(tmp_path).split("train") as split:
        for i in (0, 1, 0, 2, 0, 3, 4, 5, 1):
            assert_rows_equal(split.row(i), example_row(i))
            assert len(opened) <= 2
    assert opened == []


def test_listing_a_large_dataset_reads_one_sidecar(path, monkeypatch):
    reads = []
    read = dataset_module.Sidecar.read
    monkeypatch.setattr(
        "shards.completeness.Sidecar.read", lambda path: reads.append(path.name) or read(path)
    )
    assert missing(path) == []
    assert reads == ["shard-000002.json"]


def test_a_damaged_last_sidecar_is_not_taken_for_a_missing_shard(path):
    file = path / "train" / "shard-000002.json"
    file.write_text(file.read_text().replace('"sequences": 2', '"sequences": 3'))
    with pytest.raises(ShardCorruptError, match=r"shard-000002.json"):
        missing(path)
