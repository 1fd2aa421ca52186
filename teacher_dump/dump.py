"""A dump: what is asked for, what is there, what is missing; run that, write, continue later.

Order matters and is the same every time. Options, teacher and tokenizer are checked before anything
is written. An existing folder is compared before anything is tokenised. A new dataset starts its
engine first, so that a teacher that cannot run costs no tokenising, and probes where the BOS token
goes. Tokens come before the manifest, the manifest before shards. The same command again does what
is left and nothing twice. A lock keeps two runs out of one folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from shards.completeness import shards_to_write
from shards.continuing import (
    check_folder,
    check_spec,
    create_or_continue,
    record_completeness,
    remove_old_temporaries,
)
from shards.errors import IdentityMismatchError, InputError, RunError, ShardCorruptError
from shards.files.durable import check_links
from shards.layout import Layout
from shards.manifest import MANIFEST_NAME, Manifest, SplitSize, load_manifest
from shards.process.folder_lock import folder_lock
from shards.process.progress import ProgressLine, count
from shards.spec import SPLITS, TRAIN, DatasetSpec
from shards.tokenizer.files import TOKENIZER, check_tokenizer, hash_texts, write_tokenizer
from teacher_dump.bos import BosProbe, probe, read_probe_sample
from teacher_dump.collector import ShardPlan
from teacher_dump.config import DumpConfig
from teacher_dump.dataset_spec import make_record, make_spec
from teacher_dump.engines.interface import TeacherEngine
from teacher_dump.prepare import Prepared, prepare
from teacher_dump.shard_pass import DumpSummary, run_pass
from teacher_dump.tokens.open_store import open_or_build
from teacher_dump.tokens.sequences import SplitSequences
from teacher_dump.tokens.store import TokenStore

TOKENS = "tokens"
_UNKNOWN_LAYOUT = Layout(sequences_per_shard=1, sequences_per_row_group=1)


def run(config: DumpConfig) -> DumpSummary:
    """Make or continue the dataset of `config`. Raises LogitshardsError, one line each.

    InputError and IdentityMismatchError leave the folder as it was; RunError leaves every finished
    shard in place.
    """
    ready = prepare(config)
    spec = make_spec(config, ready, tokens_sha256="", layout=_UNKNOWN_LAYOUT)
    with _locked(config.out):
        present = _present(config.out, spec)
        ready.corpus.log()
        engine: TeacherEngine | None = None
        probed: BosProbe | None = None
        cores = os.sched_getaffinity(0)
        if present is None:
            _check_disk(config.out)
            ready.check_engine(config)
            if ready.teacher is not None:
                sample = read_probe_sample(ready)
                engine = ready.start_engine(config)
                probed = probe(config, ready, sample, engine)
        store = _tokens(config.out, ready, cores)
        manifest, splits = _manifest(config, ready, spec, store, probed)
        plans = _plans(config.out, manifest)
        if plans:
            if manifest.complete:
                manifest = record_completeness(config.out, manifest)
            if engine is None and ready.teacher is not None:
                engine = ready.start_engine(config)
            summary = run_pass(config, ready.tokenizer, manifest.spec, plans, splits, engine)
        else:
            summary = DumpSummary.nothing_to_do(config.out)
        if plans or not manifest.complete:
            record_completeness(config.out, manifest)
        return summary


def _check_disk(out: Path) -> None:
    """InputError for a folder that no dataset can be written to."""
    try:
        check_links(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error


def _present(out: Path, asked: DatasetSpec) -> Manifest | None:
    """The manifest in the folder, compared before anything is tokenised; None: a new dataset.

    A dataset without a shard makes way, whatever it is of.
    """
    if not (out / MANIFEST_NAME).exists():
        return None
    present = load_manifest(out)
    if not _has_shards(out):
        (out / MANIFEST_NAME).unlink()
        return None
    there = present.spec
    check_spec(out, replace(asked, tokens_sha256=there.tokens_sha256, layout=there.layout), there)
    return present


def _has_shards(out: Path) -> bool:
    folders = [out / split for split in SPLITS]
    return any(name.endswith(".parquet") for f in folders if f.is_dir() for name in os.listdir(f))


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder; one that was made here and in which nothing came about is removed again.

    So are tokens that were made here of another corpus than the dataset's.
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


@contextmanager
def _all_cores(cores: set[int]) -> Iterator[None]:
    """Let this thread and those it starts use these cores; an engine may have taken some away."""
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)


def _tokens(out: Path, ready: Prepared, cores: set[int]) -> TokenStore:
    line = ProgressLine()

    def report(documents: int, tokens: int) -> None:
        if line.due():
            line.show(f"tokenising: {documents:,} documents, {count(tokens)} tokens")

    def hashed(done_bytes: int, of_bytes: int) -> None:
        if line.due():
            line.show(f"hashing the corpus: {100 * done_bytes / max(1, of_bytes):.0f} %")

    folder = out / TOKENS
    arguments = (folder, ready.files, ready.tokenizer, ready.rules, report, hashed)
    try:
        with _all_cores(cores):
            try:
                return open_or_build(*arguments)
            except IdentityMismatchError:
                if (out / MANIFEST_NAME).exists():
                    raise
                # No dataset was made of these tokens: the folder is started with another corpus.
                shutil.rmtree(folder)
                return open_or_build(*arguments)
    except OSError as error:
        place = error.filename or folder
        raise RunError(f"{place}: {error.strerror or error}") from error
    finally:
        line.clear()


def _manifest(
    config: DumpConfig,
    ready: Prepared,
    spec: DatasetSpec,
    store: TokenStore,
    probed: BosProbe | None,
) -> tuple[Manifest, Mapping[str, SplitSequences]]:
    """The dataset's manifest, made or continued, and the sequences of its splits."""
    splits = {
        split: store.sequences(
            split,
            config.sequence_length,
            joined=config.joined,
            bos_token_id=ready.bos_before_sequences,
        )
        for split in SPLITS
    }
    if not len(splits[TRAIN]):
        raise InputError("--documents separate: no document has a second token to predict")
    layout = config.layout(splits[TRAIN].mean_positions)
    spec = replace(spec, tokens_sha256=store.sha256, layout=layout)
    more = {} if probed is None else {"bos_probe": probed.to_json()}
    _write_tokenizer(config.out, ready.tokenizer_files)
    manifest = create_or_continue(
        config.out, spec, _sizes(splits, config.max_tokens), make_record(config, ready, **more),
        hash_texts(ready.tokenizer_files),
    )  # fmt: skip
    check_tokenizer(config.out, manifest.tokenizer_files)
    remove_old_temporaries(config.out)
    return manifest, splits


def _write_tokenizer(out: Path, files: Mapping[str, str]) -> None:
    """Write the dataset's tokenizer, unless a dataset is there that has its own.

    ShardCorruptError where that one is gone and the teacher has another by now.
    """
    if (out / MANIFEST_NAME).exists():
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


def _plans(out: Path, manifest: Manifest) -> list[ShardPlan]:
    """The shards to write, in order; those that only lacked a sidecar have got one."""
    return [
        ShardPlan(split=split, shard=shard, sequences=sequences)
        for split in SPLITS
        for shard, sequences in shards_to_write(out, manifest, split)
    ]
