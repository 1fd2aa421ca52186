"""What a file system lacks shows before anything is tokenised, or costs a warning."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from shards.errors import InputError
from shards.files import durable
from shards.inspect import verify
from shards.keep import Tokens
from shards.process.folder_lock import folder_lock
from teacher_dump import dump
from teacher_dump.config import DumpConfig
from tests.tiny_teacher import write_corpus


@pytest.fixture
def config(tiny_teacher: Path, tmp_path: Path) -> DumpConfig:
    return DumpConfig(
        tokenizer=str(tiny_teacher),
        corpus=[write_corpus(tmp_path / "text.jsonl", num_documents=20)],
        out=tmp_path / "out",
        keep=Tokens(),
        sequence_length=32,
        held_out=0.2,
        sequences_per_shard=8,
    )


def failing(number: int):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_refused_before_tokenising(
    config: DumpConfig, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(number))
    monkeypatch.setattr(dump, "plan_dataset", lambda *_, **__: pytest.fail("tokenised"))
    with pytest.raises(InputError, match="has no hard links") as error:
        dump.run(config)
    assert "\n" not in str(error.value)
    assert not config.out.exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_folders_that_cannot_be_flushed_cost_a_warning(
    config: DumpConfig, number: int, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    fsync = os.fsync

    def only_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    with caplog.at_level(logging.WARNING):
        dump.run(config)
    assert "does not flush folders" in caplog.text
    assert verify(config.out) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_lock_that_there_is_not_costs_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with caplog.at_level(logging.WARNING), folder_lock(tmp_path / "out", "dump-logits"):
        assert (tmp_path / "out").is_dir()
    assert "its file system has no locks" in caplog.text


def test_a_finished_dataset_is_complete_where_nothing_can_be_written(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump.run(config)
    for name in ("replace", "write_new", "write_flushed"):
        monkeypatch.setattr(durable, name, failing(errno.EROFS))
    monkeypatch.setattr(os, "link", failing(errno.EROFS))
    assert dump.run(config).complete_before


def test_a_folder_without_a_shard_is_started_again_with_other_options(config: DumpConfig) -> None:
    dump.run(config)
    for split in ("train", "validation"):
        shutil.rmtree(config.out / split)
    other = replace(config, sequence_length=16, eos=False)  # other tokens, too
    assert dump.run(other).sequences > 10
    assert verify(config.out) == []
    with pytest.raises(Exception, match=r"sequence_length: 32 here, 16 there"):
        dump.run(config)


def test_a_disk_that_fills_up_on_a_finished_dataset_leaves_its_tokenizer(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump.run(config)
    before = {path: path.stat().st_mtime_ns for path in (config.out / "tokenizer").iterdir()}
    monkeypatch.setattr(durable, "sync_files", failing(errno.ENOSPC))
    assert dump.run(config).complete_before
    assert before == {path: path.stat().st_mtime_ns for path in before}
    shutil.rmtree(config.out / "tokenizer")
    with pytest.raises(Exception, match="tokenizer: No space left on device"):
        dump.run(config)
    assert not (config.out / "tokenizer").exists()
    assert "tokenizer" in verify(config.out)[0]
