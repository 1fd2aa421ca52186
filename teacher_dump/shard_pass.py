"""The pass over missing shards: sequences go to the engine, rows to the shards."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.errors import RunError
from shards.rows import Row
from shards.sidecar import Sidecar
from teacher_dump.bos import BosProbe, probe, read_probe_sample
from teacher_dump.collector import ShardCollector, ShardPlan, refuse_outdated
from teacher_dump.config import DumpConfig
from teacher_dump.coordinate import Planned
from teacher_dump.engines.interface import TeacherEngine
from teacher_dump.keep.rows import TokenSequence, make_row, row_of_tokens
from teacher_dump.pass_progress import PassProgress
from teacher_dump.prefix_check import score_checked
from teacher_dump.prepare import Prepared
from teacher_dump.processes.shard_queue import ShardQueue
from teacher_dump.tokenizer import TeacherTokenizer

logger = logging.getLogger(__name__)

_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class DumpSummary:
    """What a run did, in the shards that it published.

    Positions are labelled ones, all that the teacher scored; tokens are those that count. `missing`
    counts the shards that were missing at its end. `prepared`: it wrote none, the counts are of
    the dataset.
    """

    out: Path
    sequences: int = 0
    positions: int = 0
    tokens: int = 0
    entries: int = 0
    bytes: int = 0
    shards: int = 0
    seconds: float = 0.0
    missing: int = 0
    complete_before: bool = False
    prepared: bool = False

    @classmethod
    def of(cls, out: Path, progress: PassProgress) -> DumpSummary:
        """The summary of a pass that has ended."""
        return cls(
            out=out,
            sequences=progress.sequences,
            positions=progress.positions,
            tokens=progress.written.tokens,
            entries=progress.written.entries,
            bytes=progress.written_bytes,
            shards=progress.written_shards,
            seconds=progress.seconds,
        )

    @property
    def tokens_per_s(self) -> float:
        """Positions per second, from the engine being ready to the last shard on disk."""
        return self.positions / self.seconds if self.seconds else 0.0

    def lines(self) -> list[str]:
        """For a person."""
        if self.prepared:
            return [
                f"{self.out}: prepared, {self.positions:,} tokens in {self.sequences:,} sequences;"
                " the same command without --prepare runs the teacher"
            ]
        if self.complete_before:
            return [f"{self.out}: complete, nothing to do (inspect-shards {self.out})"]
        labels = max(1, self.tokens)  # a mask may have left none
        written = (
            f"{self.out}: {self.tokens:,} tokens in {self.sequences:,} sequences and "
            f"{self.shards:,} shards, {self.entries / labels:.1f} entries/token, "
            f"{self.bytes / labels:.1f} bytes/token, {self.tokens_per_s:,.0f} tokens/s"
        )
        if not self.missing:
            return [written]
        return [written, f"{self.out}: {self.missing:,} shards of other ranks are missing"]


def start_and_probe(
    config: DumpConfig, ready: Prepared
) -> tuple[TeacherEngine | None, BosProbe | None]:
    """The engine, and where the BOS token goes; neither without a teacher."""
    if ready.teacher is None:
        return None, None
    sample = read_probe_sample(ready)
    engine = ready.start_engine(config)
    return engine, probe(config, ready, sample, engine)


def expect_own(progress: PassProgress, queue: ShardQueue, planned: Planned) -> None:
    """Count the shards that a rank owns, for the time left."""
    for split, shards in queue.own.items():
        for run in shards.runs():
            expect_shards(progress, planned, split, run)


def expect_shards(progress: PassProgress, planned: Planned, split: str, sequences: range) -> None:
    """Count the sequences of neighbouring shards, for the time left."""
    positions_of = planned.splits[split].positions_of
    progress.expect(len(sequences), positions_of(sequences.stop) - positions_of(sequences.start))


def run_pass(
    config: DumpConfig,
    tokenizer: TeacherTokenizer,
    plans: Iterable[ShardPlan],
    planned: Planned,
    engine: TeacherEngine | None,
    progress: PassProgress,
) -> DumpSummary:
    """Write the shards of `plans`; without an engine, tokens alone.

    RunError for a disk or an engine that fails; finished shards are kept.
    """
    spec, splits = planned.manifest.spec, planned.splits

    def on_shard(sidecar: Sidecar) -> None:
        progress.wrote(sidecar.totals, sidecar.bytes)

    def sequences() -> Iterator[TokenSequence]:
        for number, plan in enumerate(plans):
            split = splits[plan.split]
            if number == 0:
                _show(split[plan.sequences.start], tokenizer)
            yield from (split[sequence] for sequence in plan.sequences)

    sizes = {name: size.sequences for name, size in planned.manifest.splits.items()}
    collector = ShardCollector(
        config.out,
        sizes,
        spec=spec,
        on_shard=on_shard,
        check=lambda plan, hint: refuse_outdated(config.out, spec, plan, hint),
    )
    try:
        with collector:
            for split_name, row in rows(sequences(), engine, config):
                collector.add(split_name, row)
                entries = 0 if row.ids is None else len(row.ids)
                progress.scored(len(row.tokens) - 1, entries)
            collector.close()
    except (OSError, ValueError) as error:
        raise RunError(f"{type(error).__name__}: {error}; finished shards are kept") from error
    finally:
        progress.finish()
    return DumpSummary.of(config.out, progress)


def rows(
    sequences: Iterator[TokenSequence], engine: TeacherEngine | None, config: DumpConfig
) -> Iterator[tuple[str, Row]]:
    """The rows of sequences with their splits, in any order; without an engine, of tokens alone.

    RunError for an engine that fails the check before its first row.
    """
    if engine is None:
        for sequence in sequences:
            yield sequence.split, row_of_tokens(sequence)
        return
    for sequence, selected in score_checked(engine, sequences, config):
        yield sequence.split, make_row(sequence, selected, config.keep.logprob_step)


def _show(sequence: TokenSequence, tokenizer: TeacherTokenizer) -> None:
    """Log how the first sequence reads, which is what the teacher sees."""
    tokens = sequence.tokens[:_SHOWN_CHARACTERS].tolist()
    text = tokenizer.backend.decode(tokens, skip_special_tokens=False)
    shown = text[:_SHOWN_CHARACTERS]
    logger.info("%s sequence %d begins: %r", sequence.split, sequence.number, shown)
