"""What one process does for all ranks: the tokens, the tokenizer and the manifest of a dataset.

A lock keeps two coordinators out of one folder. It compares an existing dataset before it tokenises
anything. It writes the tokens before the manifest, and the manifest before any shard.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shards.errors import IdentityMismatchError, InputError, RunError, ShardCorruptError
from shards.files.durable import check_links
from shards.folder import listing
from shards.folder.continuing import (
    check_folder,
    check_spec,
    create_or_continue,
    remove_old_temporaries,
)
from shards.layout import Layout
from shards.manifest import MANIFEST_NAME, Manifest, SplitSize, load_manifest
from shards.process.folder_lock import folder_lock
from shards.process.progress import ProgressLine, count
from shards.spec import SPLITS, TRAIN, DatasetSpec
from shards.tokenizer.files import TOKENIZER, check_tokenizer, hash_texts, write_tokenizer
from teacher_dump.config import DumpConfig
from teacher_dump.dataset_spec import make_record, make_spec
from teacher_dump.prepare import Prepared
from teacher_dump.processes.preparing import SignOfLife
from teacher_dump.tokens.open_store import open_or_build, open_store
from teacher_dump.tokens.sequences import SplitSequences
from teacher_dump.tokens.store import STORE_NAME, TokenStore

TOKENS = "tokens"
_UNKNOWN_LAYOUT = Layout(sequences_per_shard=1, sequences_per_row_group=1)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A dataset that is ready for its shards: the manifest, and the sequences of its splits."""

    manifest: Manifest
    splits: Mapping[str, SplitSequences]


@contextmanager
def coordinating(out: Path) -> Iterator[None]:
    """Hold the folder. If this made the folder and an input error ends the block, remove it again.

    Also remove tokens that were made here from another corpus than the dataset's.
    """
    check_folder(out)
    made = not out.exists()
    with folder_lock(out, "dump-logits"):
        tokens = out / TOKENS
        had_tokens = tokens.exists()
        try:
            yield
        except IdentityMismatchError:
            if tokens.exists() and not had_tokens:
                shutil.rmtree(tokens)
            raise
        except InputError:
            if made and not (out / MANIFEST_NAME).exists():
                shutil.rmtree(out)
            raise


def asked_spec(config: DumpConfig, ready: Prepared) -> DatasetSpec:
    """The spec that the command asks for, before its tokens and layout are known."""
    return make_spec(config, ready, tokens_sha256="", layout=_UNKNOWN_LAYOUT)


def compare(out: Path, asked: DatasetSpec) -> bool:
    """Whether the folder has a dataset with shards. IdentityMismatchError if it is another one.

    A dataset without a shard may be replaced.
    """
    if not has_shards(out):
        return False
    _check_same(out, asked, load_manifest(out).spec)
    return True


def has_shards(out: Path) -> bool:
    """Whether a dataset with at least one shard is in the folder."""
    if not (out / MANIFEST_NAME).exists():
        return False
    return any(listing.has_shards(out / split) for split in SPLITS)


def check_disk(out: Path) -> None:
    """InputError for a folder that no dataset can be written to."""
    try:
        check_links(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error


def plan_dataset(
    config: DumpConfig,
    ready: Prepared,
    asked: DatasetSpec,
    cores: set[int],
    sign: SignOfLife,
    **record: Any,
) -> Planned:
    """Make or continue tokens, tokenizer and manifest. `record` is kept beside the manifest's own.

    InputError for a corpus without two tokens in a row, RunError if the disk fails.
    """
    store = _tokens(config.out, ready, cores, sign)
    splits = _sequences(config, ready, store)
    if not len(splits[TRAIN]):
        raise InputError("--documents separate: no document has a second token to predict")
    _write_tokenizer(config.out, ready.tokenizer_files)
    manifest = create_or_continue(
        config.out,
        _complete(config, asked, store, splits),
        _sizes(splits, config.max_tokens),
        make_record(config, ready, **record),
        hash_texts(ready.tokenizer_files),
        replacing=not has_shards(config.out),
    )
    check_tokenizer(config.out, manifest.tokenizer_files)
    remove_old_temporaries(config.out)
    return Planned(manifest=manifest, splits=splits)


def planned_by_another(config: DumpConfig, ready: Prepared, asked: DatasetSpec) -> Planned | None:
    """The dataset that rank 0 planned; None while it is not complete.

    IdentityMismatchError if it has shards and is another dataset than this command asks for.
    """
    out = config.out
    if not ((out / MANIFEST_NAME).exists() and (out / TOKENS / STORE_NAME).exists()):
        return None
    manifest = load_manifest(out)
    try:
        _check_same(out, asked, manifest.spec)
        store = open_store(out / TOKENS, ready.files, ready.rules)
        splits = _sequences(config, ready, store)
        check_spec(out, _complete(config, asked, store, splits), manifest.spec)
    except FileNotFoundError as error:
        if error.filename != str(out / TOKENS / STORE_NAME):
            raise
        return None  # rank 0 replaces it
    except IdentityMismatchError:
        if has_shards(out):
            raise
        return None  # rank 0 replaces it
    for split, size in _sizes(splits, config.max_tokens).items():
        there = manifest.splits.get(split)
        if there is None or there.sequences < size.sequences:
            return None  # rank 0 extends it
    check_tokenizer(out, manifest.tokenizer_files)
    return Planned(manifest=manifest, splits=splits)


def _check_same(out: Path, asked: DatasetSpec, there: DatasetSpec) -> None:
    check_spec(out, replace(asked, tokens_sha256=there.tokens_sha256, layout=there.layout), there)


def _complete(
    config: DumpConfig,
    asked: DatasetSpec,
    store: TokenStore,
    splits: Mapping[str, SplitSequences],
) -> DatasetSpec:
    layout = config.layout(splits[TRAIN].mean_positions)
    return replace(asked, tokens_sha256=store.sha256, layout=layout)


def _sequences(
    config: DumpConfig, ready: Prepared, store: TokenStore
) -> Mapping[str, SplitSequences]:
    return {
        split: store.sequences(
            split,
            config.sequence_length,
            joined=config.joined,
            bos_token_id=ready.bos_before_sequences,
        )
        for split in SPLITS
    }


@contextmanager
def _all_cores(cores: set[int]) -> Iterator[None]:
    """Let this thread and those it starts use these cores; an engine may have taken some away."""
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)


def _tokens(out: Path, ready: Prepared, cores: set[int], sign: SignOfLife) -> TokenStore:
    line = ProgressLine()

    def show(text: str) -> None:
        sign.text = text
        if line.due():
            line.show(text)

    def report(documents: int, tokens: int) -> None:
        show(f"tokenising: {documents:,} documents, {count(tokens)} tokens")

    def hashed(done_bytes: int, of_bytes: int) -> None:
        show(f"hashing the corpus: {100 * done_bytes / max(1, of_bytes):.0f} %")

    folder = out / TOKENS
    try:
        with _all_cores(cores):
            try:
                return _open_or_build(out, ready, report, hashed)
            except IdentityMismatchError:
                if has_shards(out):
                    raise
                # No shard was made of these tokens: the folder is started with another corpus.
                shutil.rmtree(folder)
                return _open_or_build(out, ready, report, hashed)
    except OSError as error:
        path = error.filename or folder
        raise RunError(f"{path}: {error.strerror or error}") from error
    finally:
        line.clear()


def _open_or_build(out: Path, ready: Prepared, report: Any, hashed: Any) -> TokenStore:
    return open_or_build(out / TOKENS, ready.files, ready.tokenizer, ready.rules, report, hashed)


def _write_tokenizer(out: Path, files: Mapping[str, str]) -> None:
    """Write the dataset's tokenizer, unless a dataset is there that has its own.

    ShardCorruptError if that copy is missing and the teacher's tokenizer has changed.
    """
    if has_shards(out):
        if (out / TOKENIZER).is_dir():
            return
        if load_manifest(out).tokenizer_files != hash_texts(files):
            raise ShardCorruptError(
                f"{out / TOKENIZER}: missing, and the teacher's tokenizer files have changed since"
                " it was written; put a copy of it back"
            )
    try:
        write_tokenizer(out, files)
    except OSError as error:
        raise RunError(f"{out / TOKENIZER}: {error.strerror or error}") from error


def _sizes(splits: Mapping[str, SplitSequences], max_tokens: int | None) -> dict[str, SplitSize]:
    """Whole sequences from the front of each split, in proportion to the splits, at least one each.

    Growing `max_tokens` never shrinks a split, so that a larger one extends the dataset.
    """
    total = sum(split.num_positions for split in splits.values())
    sizes = {}
    for name, split in splits.items():
        wanted = len(split)
        if max_tokens is not None and max_tokens < total and wanted:
            share = max_tokens * split.num_positions // total
            wanted = max(1, split.sequences_within(share))
        sizes[name] = SplitSize(sequences=wanted, positions=split.positions_of(wanted))
    return sizes
