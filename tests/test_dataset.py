"""A folder is continued, extended, refused or opened by what is in it, never by guessing."""

import json
import os
import random
import shutil
import time
from dataclasses import replace

import pytest

from shards import dataset as dataset_module
from shards.dataset import Dataset
from shards.errors import (
    IdentityMismatchError,
    InputError,
    RunError,
    ShardCorruptError,
    ShardError,
    ShardFormatError,
)
from shards.files import durable
from shards.files.durable import temporary_name
from shards.files.sealed import seal
from shards.folder.completeness import is_missing, missing_shards, remove_shard
from shards.folder.continuing import (
    check_folder,
    create_or_continue,
    record_completeness,
    remove_old_temporaries,
)
from shards.layout import Layout
from shards.manifest import SplitSize, load_manifest
from shards.sidecar import Sidecar
from tests.strategies import (
    assert_rows_equal,
    example_row,
    make_spec,
    write_dataset,
    write_shard,
)

SPEC = make_spec(sequences_per_shard=4, sequences_per_row_group=3)


def sizes(**num_sequences):
    return {
        name: SplitSize(sequences=number, positions=16 * number)
        for name, number in num_sequences.items()
    }


def make(path, recorded=None, **num_sequences):
    recorded = recorded or {"engine": "a"}
    return create_or_continue(path, SPEC, sizes(**num_sequences), recorded, {})


def missing(path, split="train"):
    return [number for number, _ in missing_shards(path, load_manifest(path), split)]


def drop(path, split, *shards):
    """Remove shards by hand, and find out."""
    for shard in shards:
        for suffix in ("json", "parquet"):
            (path / split / f"shard-{shard:06}.{suffix}").unlink()
    record_completeness(path, load_manifest(path))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "dataset"
    write_dataset(path, SPEC, train=10, validation=2)
    return path


def test_a_new_folder_gets_a_manifest_and_lacks_every_shard(tmp_path):
    manifest = make(tmp_path / "a" / "b", train=10, validation=0)
    assert load_manifest(tmp_path / "a" / "b") == manifest
    assert manifest.spec == SPEC
    assert manifest.splits == sizes(train=10, validation=0)
    assert manifest.recorded == ({"engine": "a"},)
    expected = [(0, range(4)), (1, range(4, 8)), (2, range(8, 10))]
    assert list(missing_shards(tmp_path / "a" / "b", manifest, "train")) == expected
    assert list(missing_shards(tmp_path / "a" / "b", manifest, "validation")) == []


def test_what_was_written_is_what_a_dataset_gives_back(path):
    dataset = Dataset.open(path)
    assert dataset.split_names == ["train", "validation"]
    assert dataset.spec == SPEC
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
    write_dataset(path, SPEC, train=17)
    with Dataset.open(path).split("train") as split:
        for found, i in zip(split.rows(), range(17), strict=True):
            assert_rows_equal(found, example_row(i))


def test_extending_a_full_last_shard_keeps_it(tmp_path):
    write_dataset(tmp_path, SPEC, train=8)
    before = (tmp_path / "train" / "shard-000001.parquet").stat()
    make(tmp_path, train=9)
    assert missing(tmp_path) == [2]
    assert (tmp_path / "train" / "shard-000001.parquet").stat() == before


@pytest.mark.parametrize(("fails_at", "left"), [(1, []), (2, [2])])
def test_an_interrupted_extension_leaves_no_short_shard_in_the_middle(
    path, monkeypatch, fails_at, left
):
    """The first write says that the dataset is not complete, the second how large it is."""
    calls = []
    replace_file = durable.replace

    def fail(path, text):
        calls.append(path)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        replace_file(path, text)

    monkeypatch.setattr("shards.files.durable.replace", fail)
    with pytest.raises(RunError, match=r"manifest.json: cannot be written: No space left"):
        make(path, train=17)
    monkeypatch.undo()
    assert load_manifest(path).splits == sizes(train=10, validation=2)
    assert load_manifest(path).complete == (not left)
    assert missing(path) == left
    write_dataset(path, SPEC, train=17)
    assert len(list(Dataset.open(path).split("train").sidecars())) == 5


def test_a_short_shard_that_a_writer_publishes_during_an_extension_is_removed(path, monkeypatch):
    replace_file, calls = durable.replace, []

    def replace_late(file, text):
        calls.append(file)
        if len(calls) == 2:  # the outgrown shard is gone, the manifest is still the older one
            write_shard(path / "train", [example_row(8), example_row(9)], SPEC, shard=2)
        replace_file(file, text)

    monkeypatch.setattr("shards.files.durable.replace", replace_late)
    make(path, train=17)
    assert len(calls) == 2
    assert missing(path) == [2, 3, 4]


def test_a_last_shard_that_is_too_short_does_not_count(path):
    drop(path, "train", 2)
    write_shard(path / "train", [example_row(8)], SPEC, shard=2)
    assert missing(path) == [2]


def test_a_last_shard_that_is_too_short_is_not_replaced_and_the_error_says_what_to_do(path):
    drop(path, "train", 2)
    write_shard(path / "train", [example_row(8)], SPEC, shard=2)
    before = listing(path / "train")
    with pytest.raises(ShardCorruptError) as caught:
        is_missing(path, load_manifest(path), "train", 2, range(8, 10))
    assert "shard-000002.parquet: holds 1 sequences, expected 2; delete it" in str(caught.value)
    assert listing(path / "train") == before


def test_a_shard_counts_once_its_sidecar_is_there(path):
    sidecar = path / "train" / "shard-000001.json"
    hidden = sidecar.rename(path / "train" / "hidden")
    assert missing(path) == [1]
    hidden.rename(sidecar)
    assert missing(path) == []
    (path / "train" / "shard-000001.parquet").unlink()
    assert missing(path) == [1]


def test_a_shard_without_a_sidecar_gets_one_and_is_not_written_again(path):
    sidecar = path / "train" / "shard-000001.json"
    parquet = sidecar.with_suffix(".parquet")
    before, inode = sidecar.read_bytes(), parquet.stat().st_ino
    sidecar.unlink()
    assert missing(path) == [1]
    assert not is_missing(path, load_manifest(path), "train", 1, range(4, 8))
    assert sidecar.read_bytes() == before
    assert parquet.stat().st_ino == inode
    with Dataset.open(path).split("train") as split:
        assert_rows_equal(split.row(5), example_row(5))


def test_a_sidecar_without_its_shard_is_an_error_before_anything_is_written(path):
    (path / "train" / "shard-000001.parquet").unlink()
    before = listing(path / "train")
    with pytest.raises(ShardError, match=r"shard-000001.json: describes a shard that is missing"):
        is_missing(path, load_manifest(path), "train", 1, range(4, 8))
    assert listing(path / "train") == before


def listing(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_removing_a_shard_touches_no_other_file(path):
    folder = path / "train"
    temporary_name(folder / "shard-000001.parquet").touch()
    before = listing(folder)
    remove_shard(path, "train", 1)
    del before["shard-000001.json"], before["shard-000001.parquet"]
    assert listing(folder) == before
    remove_shard(path, "train", 1)
    remove_shard(path, "no-such-split", 0)
    assert listing(folder) == before


def test_only_temporary_files_that_are_a_day_old_are_removed(path):
    now = time.time()
    old, new = [], []
    for folder in (path, path / "train", path / "validation"):
        for age, names in ((86_401, old), (86_000, new)):
            file = temporary_name(folder / "shard-000001.parquet")
            file.touch()
            os.utime(file, (now - age, now - age))
            names.append(file)
        for name in ("shard-000000.json", ".hidden", ".shard-000001.parquet.tmp"):
            (folder / name).touch()
            os.utime(folder / name, (now - 1e6, now - 1e6))
            new.append(folder / name)
    folder = temporary_name(path / "tokenizer")
    folder.mkdir()
    (folder / "tokenizer.json").touch()
    os.utime(folder, (now - 86_401, now - 86_401))
    old.append(folder)
    remove_old_temporaries(path)
    assert not any(file.exists() for file in old)
    assert all(file.exists() for file in new)
    remove_old_temporaries(path / "absent")


def test_another_spec_is_refused_naming_every_difference(path):
    other = replace(SPEC, seed=7, keep=replace(SPEC.keep, top_k=50))
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(IdentityMismatchError) as caught:
        create_or_continue(path, other, sizes(train=20), {}, {})
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
    with pytest.raises(InputError, match=r"contains thesis\.tex but no dataset"):
        make(tmp_path, train=1)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="expected a folder for the dataset, found a file"):
        check_folder(tmp_path / "thesis.tex")


def test_a_folder_that_was_only_prepared_is_taken(tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokenizer").mkdir()
    temporary_name(tmp_path / "manifest.json").touch()
    make(tmp_path, train=1)
    assert missing(tmp_path) == [0]


def test_two_runs_that_start_at_once_share_the_first_manifest(tmp_path, monkeypatch):
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


def reseal(path, change):
    """Change the content of a manifest as another release might write it."""
    file = path / "manifest.json"
    content = json.loads(file.read_text())
    del content["checksum"], content["format_version"]
    change(content)
    file.write_text(seal(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(shards=3), "manifest.json: unknown key 'shards'"),
        (lambda m: m.pop("complete"), "manifest.json: no key 'complete'"),
        (lambda m: m.update(complete=1), "key 'complete': expected bool, found 1"),
        (lambda m: m.update(splits=[]), "key 'splits': expected an object, found []"),
        (
            lambda m: m["splits"].update(test={"sequences": 1, "positions": 1}),
            "unknown split 'test', this release knows train, validation",
        ),
        (lambda m: m["splits"]["train"].update(rows=1), "unknown key 'splits.train.rows'"),
        (lambda m: m["splits"]["train"].pop("positions"), "no key 'splits.train.positions'"),
        (
            lambda m: m["splits"]["train"].update(sequences="10"),
            "key 'splits.train.sequences': expected int, found '10'",
        ),
        (lambda m: m.update(recorded={}), "key 'recorded': expected a list, found {}"),
        (lambda m: m.update(recorded=["vllm"]), "key 'recorded.0': expected an object"),
        (
            lambda m: m.update(tokenizer_files={"tokenizer.json": None}),
            "key 'tokenizer_files.tokenizer.json': expected str, found None",
        ),
        (lambda m: m.update(spec=None), "spec: expected an object, found None"),
        (lambda m: m["spec"].update(teacher_entropy=True), "spec: unknown key 'teacher_entropy'"),
    ],
)
def test_a_manifest_of_another_release_is_refused_by_the_name_of_the_key(path, change, message):
    reseal(path, change)
    with pytest.raises(ShardFormatError) as caught:
        Dataset.open(path)
    assert message in str(caught.value)
    assert str(path / "manifest.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_white_space_and_key_order_of_a_manifest_are_free(path):
    intact = load_manifest(path)
    file = path / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(content.items()))))
    assert load_manifest(path) == intact


def test_an_incomplete_dataset_says_what_is_missing_and_what_to_do(path):
    drop(path, "train", 0, 2)
    with pytest.raises(ShardError, match=r"2 of 3 shards of split train .*same dump-logits"):
        Dataset.open(path)


def test_an_empty_split_is_not_there(tmp_path):
    write_dataset(tmp_path, SPEC, train=3, validation=0)
    dataset = Dataset.open(tmp_path)
    assert dataset.split_names == ["train"]
    for name in ("validation", "test"):
        with pytest.raises(ShardError, match=f"no split {name}; there is train"):
            dataset.split(name)


def test_a_shard_of_another_dataset_is_refused(path, tmp_path):
    other = replace(SPEC, seed=1)
    drop(path, "train", 1)
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
    split = dataset_module.Split(path / "train", manifest.splits["train"], manifest.spec)
    with split, pytest.raises(ShardCorruptError, match="holds 4 sequences of split train from 0"):
        split.row(5)


def test_a_short_shard_in_the_middle_is_refused(path):
    drop(path, "train", 1)
    write_shard(path / "train", [example_row(4)], SPEC, shard=1)
    with (
        Dataset.open(path).split("train") as split,
        pytest.raises(ShardCorruptError, match="holds 1 sequences"),
    ):
        split.row(4)


def test_open_readers_are_bounded_and_reopen(tmp_path, monkeypatch):
    spec = make_spec(sequences_per_shard=1, sequences_per_row_group=1)
    write_dataset(tmp_path, spec, train=6)
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
    read = Sidecar.read
    monkeypatch.setattr(
        "shards.folder.completeness.Sidecar.read",
        lambda path: reads.append(path.name) or read(path),
    )
    assert missing(path) == []
    assert reads == ["shard-000002.json"]


def test_a_damaged_last_sidecar_is_not_taken_for_a_missing_shard(path):
    file = path / "train" / "shard-000002.json"
    file.write_text(file.read_text().replace('"sequences": 2', '"sequences": 3'))
    with pytest.raises(ShardCorruptError, match=r"shard-000002.json"):
        missing(path)


def test_opening_a_complete_dataset_lists_no_folder_and_reads_no_sidecar(path, monkeypatch):
    assert load_manifest(path).complete

    def fail(*_):
        raise AssertionError("a sidecar was read")

    listed = []
    listdir, scandir = os.listdir, os.scandir
    monkeypatch.setattr("os.listdir", lambda folder: listed.append(folder) or listdir(folder))
    monkeypatch.setattr("os.scandir", lambda folder: listed.append(folder) or scandir(folder))
    monkeypatch.setattr(Sidecar, "read", fail)
    dataset = Dataset.open(path)
    assert dataset.split("train").num_sequences == 10
    assert listed == [path / "tokenizer"]


def test_a_dataset_is_complete_once_every_shard_was_there(tmp_path):
    manifest = make(tmp_path, train=5, validation=1)
    assert not manifest.complete
    write_shard(tmp_path / "train", [example_row(i) for i in range(4)], SPEC)
    write_shard(tmp_path / "validation", [example_row(0)], SPEC)
    assert not record_completeness(tmp_path, manifest).complete
    assert not load_manifest(tmp_path).complete
    write_shard(tmp_path / "train", [example_row(4)], SPEC, shard=1)
    assert record_completeness(tmp_path, manifest).complete
    assert load_manifest(tmp_path).complete


def test_a_dataset_that_is_extended_is_not_complete_any_more(path):
    assert not make(path, train=17).complete
    assert not load_manifest(path).complete
    with pytest.raises(ShardError, match="3 of 5 shards of split train are missing"):
        Dataset.open(path)
    write_dataset(path, SPEC, train=17)
    assert load_manifest(path).complete


def test_an_extension_that_is_killed_at_any_step_never_seems_to_be_complete(path, monkeypatch):
    """Whatever is on disk when it ends: the short shard, or a manifest that says otherwise."""
    steps = []
    for name in ("replace", "sync_folder"):
        step = getattr(durable, name)
        monkeypatch.setattr(durable, name, counted(step, steps, kill_at=None))
    backup = path.with_name("backup")
    shutil.copytree(path, backup)
    make(path, train=17)
    assert steps
    for kill_at in range(len(steps)):
        monkeypatch.undo()
        shutil.rmtree(path)
        shutil.copytree(backup, path)
        done = []
        for name in ("replace", "sync_folder"):
            step = getattr(durable, name)
            monkeypatch.setattr(durable, name, counted(step, done, kill_at=kill_at))
        with pytest.raises(KeyboardInterrupt):
            make(path, train=17)
        monkeypatch.undo()
        manifest = load_manifest(path)
        if manifest.complete:
            assert missing(path) == []
            with Dataset.open(path).split("train") as split:
                assert sum(1 for _ in split.rows()) == 10
        write_dataset(path, SPEC, train=17)
        assert len(list(Dataset.open(path).split("train").rows())) == 17


def counted(step, steps, *, kill_at):
    def run(*arguments):
        if len(steps) == kill_at:
            raise KeyboardInterrupt
        steps.append(step.__name__)
        return step(*arguments)

    return run
