"""The pass: what is asked for, what is there, what is missing; run that, write, continue later.

Order matters and is the same every time: options, teacher and tokenizer are checked before anything
is written; an existing folder is compared by identity before anything is tokenised; tokens come
before shards; the engine starts only when a shard is missing. The same command again does what is
left and nothing twice. A lock keeps two runs out of one folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.completeness import discard_shard, missing_shards
from shards.continuing import check_folder, check_identity, create_or_continue
from shards.errors import IdentityMismatchError, InputError, RunError
from shards.folder_lock import folder_lock
from shards.layout import Layout
from shards.manifest import MANIFEST_NAME, Manifest, SplitSize, load_manifest
from shards.progress_line import ProgressLine, count
from shards.sidecar import Sidecar
from teacher_dump.collector import ShardCollector, ShardPlan, make_row
from teacher_dump.config import DumpConfig
from teacher_dump.engines import TeacherEngine
from teacher_dump.identity import (
    complete_identity,
    make_identity,
    make_record,
    without_tokens,
)
from teacher_dump.open_store import open_or_build
from teacher_dump.prepare import prepare
from teacher_dump.progress import PassProgress
from teacher_dump.rules import TokenisingRules
from teacher_dump.sequences import SplitSequences, TokenSequence
from teacher_dump.token_store import SPLITS, TokenStore
from teacher_dump.tokenizer import TeacherTokenizer


@dataclass(frozen=True, kw_only=True)
class DumpSummary:
    """What a run did, in the shards that it published.

    Positions are labelled ones, all that the teacher scored; tokens are those that count.
    """

    out: Path
    sequences: int
    positions: int
    tokens: int
    entries: int
    bytes: int
    shards: int
    seconds: float
    complete_before: bool

    @property
    def tokens_per_s(self) -> float:
        """Positions per second, from the engine being ready to the last shard on disk."""
        return self.positions / self.seconds if self.seconds else 0.0


def run(config: DumpConfig) -> DumpSummary:
    """Make or continue the dataset of `config`. Raises LogitshardsError, one line each.

    InputError and IdentityMismatchError leave the folder as it was; RunError leaves every finished
    shard in place.
    """
    ready = prepare(config)
    rules = ready.rules
    identity = make_identity(config, ready.teacher, rules, ready.keep)
    with _locked(config.out):
        _refuse_another(config.out, identity)
        if not (config.out / MANIFEST_NAME).exists():
            ready.check_engine(config)
        ready.corpus.log()
        store = _tokens(config.out, ready.files, ready.tokenizer, rules)
        splits = {
            split: store.sequences(split, config.sequence_length, joined=config.joined)
            for split in SPLITS
        }
        if not len(splits["train"]):
            raise InputError("--documents separate: no document has a second token to predict")
        layout = config.layout(splits["train"].mean_positions)
        identity = complete_identity(identity, store.sha256, layout)
        sizes = _sizes(splits, config.max_tokens)
        _save_tokenizer(ready.tokenizer, config.out / "tokenizer")
        recorded = make_record(config, ready.teacher, ready.corpus)
        manifest = create_or_continue(config.out, identity, sizes, recorded)
        plans = _plans(config.out, manifest)
        if not plans:
            return _summary(config.out, [], None)
        engine = ready.start_engine(config)
        return _run_pass(config, identity, plans, splits, engine)


def _refuse_another(out: Path, identity: Mapping[str, Any]) -> None:
    """Compare with the folder's manifest, if there is one, before anything is tokenised."""
    if not (out / MANIFEST_NAME).exists():
        return
    check_identity(out, identity, without_tokens(load_manifest(out).identity))


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder; one that was made here and in which nothing came about is removed again.

    So are tokens that were made here of another corpus than the dataset's.
    """
    check_folder(out)
    made = not out.exists()
    with folder_lock(out, "dump-logits"):
        tokens = out / "tokens"
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


def _tokens(out: Path, files: Any, tokenizer: Any, rules: TokenisingRules) -> TokenStore:
    line = ProgressLine()

    def report(documents: int, tokens: int) -> None:
        if line.due():
            line.show(f"tokenising: {documents:,} documents, {count(tokens)} tokens")

    def hashed(done_bytes: int, of_bytes: int) -> None:
        if line.due():
            line.show(f"hashing the corpus: {100 * done_bytes / max(1, of_bytes):.0f} %")

    try:
        return open_or_build(out / "tokens", files, tokenizer, rules, report, hashed)
    except OSError as error:
        place = error.filename or out / "tokens"
        raise RunError(f"{place}: {error.strerror or error}") from error
    finally:
        line.clear()


def _save_tokenizer(tokenizer: TeacherTokenizer, folder: Path) -> None:
    try:
        tokenizer.save(folder)
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror or error}") from error


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
    """The shards to write, in order; what a kill left behind without a sidecar is removed."""
    plans = []
    for split in SPLITS:
        for shard, sequences in missing_shards(out, manifest, split):
            discard_shard(out, split, shard)
            plans.append(ShardPlan(split=split, shard=shard, sequences=sequences))
    return plans


def _run_pass(
    config: DumpConfig,
    identity: dict[str, Any],
    plans: list[ShardPlan],
    splits: Mapping[str, SplitSequences],
    engine: TeacherEngine,
) -> DumpSummary:
    published: list[Sidecar] = []
    missing = [(plan.split, plan.sequences) for plan in plans]
    progress = PassProgress(
        sum(len(numbers) for _, numbers in missing),
        sum(
            splits[split].positions_of(numbers.stop) - splits[split].positions_of(numbers.start)
            for split, numbers in missing
        ),
    )

    def on_shard(sidecar: Sidecar) -> None:
        published.append(sidecar)
        progress.wrote(sidecar.tokens, sidecar.bytes)

    def sequences() -> Iterator[TokenSequence]:
        for split, numbers in missing:
            for number in numbers:
                yield splits[split][number]

    collector = ShardCollector(
        config.out,
        plans,
        identity=identity,
        layout=Layout.of(identity),
        on_shard=on_shard,
    )
    try:
        with collector:
            for sequence, selected in engine.score(sequences()):
                collector.add(sequence.split, make_row(sequence, selected, config.logprob_step))
                progress.scored(len(selected.counts), len(selected.ids))
            collector.close()
    except (OSError, ValueError) as error:
        raise RunError(f"{type(error).__name__}: {error}; finished shards are kept") from error
    finally:
        progress.finish()
    return _summary(config.out, published, progress)


def _summary(out: Path, published: list[Sidecar], progress: PassProgress | None) -> DumpSummary:
    return DumpSummary(
        out=out,
        sequences=progress.sequences if progress else 0,
        positions=progress.positions if progress else 0,
        tokens=sum(sidecar.tokens for sidecar in published),
        entries=sum(sidecar.entries for sidecar in published),
        bytes=sum(sidecar.bytes for sidecar in published),
        shards=len(published),
        seconds=progress.seconds if progress else 0.0,
        complete_before=progress is None,
    )
