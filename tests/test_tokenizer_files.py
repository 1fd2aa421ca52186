"""A dataset's tokenizer is written once, whole or not at all, and a change is noticed."""

import hashlib
import shutil
from dataclasses import replace

import pytest

from shards.dataset import Dataset
from shards.errors import ShardCorruptError
from shards.files import durable
from shards.inspect import verify
from shards.manifest import load_manifest
from shards.tokenizer.files import (
    check_content,
    check_tokenizer,
    hash_files,
    hash_texts,
    write_tokenizer,
)
from tests.tiny_dataset import make_dataset

CONTENT = {"tokenizer.json": '{"model": 1}', "tokenizer_config.json": "{}"}


def save(folder):
    for name, text in CONTENT.items():
        (folder / name).write_text(text)


@pytest.fixture
def path(tmp_path):
    return make_dataset(tmp_path / "dataset", train=4, validation=2)


def check_noticed(dataset, file, text):
    """By opening and by verifying, in one line that names the file and what to do."""
    with pytest.raises(ShardCorruptError) as caught:
        Dataset.open(dataset)
    message = str(caught.value)
    assert message.startswith(f"{file}: {text}")
    assert "delete the folder tokenizer, and the same command writes it" in message
    assert "\n" not in message
    assert verify(dataset) == [message]


def test_an_intact_tokenizer_has_no_problems(path):
    assert Dataset.open(path).manifest.tokenizer_files == hash_files(path / "tokenizer")
    assert len(hash_files(path / "tokenizer")) >= 2
    assert verify(path) == []


def test_a_missing_file_is_noticed(path):
    for name in hash_files(path / "tokenizer"):
        file = path / "tokenizer" / name
        content = file.read_bytes()
        file.unlink()
        check_noticed(path, file, "missing")
        file.write_bytes(content)
    assert verify(path) == []


@pytest.mark.parametrize("how", ["a byte", "cut", "emptied", "longer"])
def test_a_changed_file_is_noticed(path, how):
    for name in hash_files(path / "tokenizer"):
        file = path / "tokenizer" / name
        content = file.read_bytes()
        changed = {
            "a byte": content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
            "cut": content[:-1],
            "emptied": b"",
            "longer": content + b"\n",
        }
        file.write_bytes(changed[how])
        check_noticed(path, file, "does not match its hash in the manifest")
        file.write_bytes(content)


def test_a_missing_folder_is_noticed(path):
    shutil.rmtree(path / "tokenizer")
    check_noticed(path, path / "tokenizer", "cannot be read (No such file or directory)")


def test_a_file_in_place_of_the_folder_is_noticed(path):
    shutil.rmtree(path / "tokenizer")
    (path / "tokenizer").write_text("a file")
    check_noticed(path, path / "tokenizer", "cannot be read (Not a directory)")


def test_a_dangling_link_is_noticed(path):
    name = next(iter(hash_files(path / "tokenizer")))
    file = path / "tokenizer" / name
    file.unlink()
    file.symlink_to("absent")
    check_noticed(path, file, "missing")


def test_a_file_that_was_added_changes_nothing(path):
    (path / "tokenizer" / "README.md").write_text("hello")
    Dataset.open(path)
    assert verify(path) == []


def test_problems_of_shards_are_found_beside_those_of_the_tokenizer(path):
    (path / "tokenizer" / "tokenizer.json").unlink()
    shard = path / "train" / "shard-000000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    first, second = verify(path)
    assert "tokenizer.json: missing" in first
    assert "shard-000000.parquet: damaged" in second


def test_writing_makes_the_folder_hold_these_files(tmp_path):
    write_tokenizer(tmp_path / "dataset", CONTENT)
    expected = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in CONTENT.items()}
    assert hash_texts(CONTENT) == expected == hash_files(tmp_path / "dataset" / "tokenizer")
    check_tokenizer(tmp_path / "dataset", expected)
    assert [file.name for file in (tmp_path / "dataset").iterdir()] == ["tokenizer"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("is_there", [False, True])
def test_writing_that_fails_half_way_leaves_what_was_there(tmp_path, monkeypatch, error, is_there):
    other = {"tokenizer.json": "{}"}
    if is_there:
        write_tokenizer(tmp_path, other)

    def fail(folder):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(durable, "sync_files", fail)
        with pytest.raises(error):
            write_tokenizer(tmp_path, CONTENT)
    left = [file.name for file in tmp_path.iterdir()]
    assert left == (["tokenizer"] if is_there else [])
    if is_there:
        assert hash_files(tmp_path / "tokenizer") == hash_texts(other)
    write_tokenizer(tmp_path, CONTENT)
    assert hash_files(tmp_path / "tokenizer") == hash_texts(CONTENT)


def test_the_same_files_are_not_written_again(tmp_path):
    write_tokenizer(tmp_path, CONTENT)
    before = {file.name: file.stat() for file in (tmp_path / "tokenizer").iterdir()}
    write_tokenizer(tmp_path, CONTENT)
    after = {file.name: file.stat() for file in (tmp_path / "tokenizer").iterdir()}
    for name, stat in before.items():
        assert (after[name].st_ino, after[name].st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_files_of_another_tokenizer_are_replaced(tmp_path):
    write_tokenizer(tmp_path, {"tokenizer.json": "other", "merges.txt": "a b"})
    write_tokenizer(tmp_path, CONTENT)
    assert hash_files(tmp_path / "tokenizer") == hash_texts(CONTENT)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer"]


def test_a_folder_is_there_in_full_or_not_at_all(tmp_path, monkeypatch):
    """Whoever looks while it is written sees no folder of this name; then it is renamed."""
    inodes = []

    def look(folder):
        assert hash_files(folder) == hash_texts(CONTENT)
        assert not (tmp_path / "tokenizer").exists()
        assert folder.parent == tmp_path
        inodes.append(folder.stat().st_ino)

    monkeypatch.setattr(durable, "sync_files", look)
    write_tokenizer(tmp_path, CONTENT)
    assert [(tmp_path / "tokenizer").stat().st_ino] == inodes


def test_verifying_notices_a_tokenizer_that_maps_text_to_other_ids(path):
    """Also where the manifest has its hash: then it was another one when the dataset was made."""
    file = path / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("word7", "word8x"))
    manifest = load_manifest(path)
    hashes = hash_files(path / "tokenizer")
    (path / "manifest.json").write_text(replace(manifest, tokenizer_files=hashes).to_text())
    with pytest.raises(ShardCorruptError, match=r"tokenizer\.json: is another tokenizer"):
        check_content(path, load_manifest(path).spec.tokenizer.sha256)
    (line,) = [line for line in verify(path) if "another tokenizer" in line]
    assert line.startswith(str(file))
