"""The pass over missing shards: sequences go to the engine, rows to the shards."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import RunError
from shards.rows import Row
from shards.sidecar import Sidecar
from shards.spec import DatasetSpec
from teacher_dump.collector import ShardCollector, ShardPlan
from teacher_dump.config import DumpConfig
from teacher_dump.engines.interface import TeacherEngine
from teacher_dump.keep.rows import TokenSequence, make_row, row_of_tokens
from teacher_dump.pass_progress import PassProgress
from teacher_dump.tokenizer import TeacherTokenizer
from teacher_dump.tokens.sequences import SplitSequences

logger = logging.getLogger(__name__)

_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class DumpSummary:
    """What a run did, in the shards that it published.

    Positions are labelled ones, all that the teacher scored; tokens are those that count.
    """

    out: Path
    sequences: int = 0
    positions: int = 0
    tokens: int = 0
    entries: int = 0
    bytes: int = 0
    shards: int = 0
    seconds: float = 0.0
    complete_before: bool = False

    @classmethod
    def nothing_to_do(cls, out: Path) -> DumpSummary:
        """Of a dataset that was complete before."""
        return cls(out=out, complete_before=True)

    @property
    def tokens_per_s(self) -> float:
        """Positions per second, from the engine being ready to the last shard on disk."""
        return self.positions / self.seconds if self.seconds else 0.0


def run_pass(
    config: DumpConfig,
    tokenizer: TeacherTokenizer,
    spec: DatasetSpec,
    plans: Sequence[ShardPlan],
    splits: Mapping[str, SplitSequences],
    engine: TeacherEngine | None,
) -> DumpSummary:
    """Write the shards of `plans`; without an engine, tokens alone.

    RunError for a disk or an engine that fails; finished shards are kept.
    """
    published: list[Sidecar] = []
    numbers = [(splits[plan.split], plan.sequences) for plan in plans]
    progress = PassProgress(
        sum(len(plan.sequences) for plan in plans),
        sum(
            split.positions_of(part.stop) - split.positions_of(part.start)
            for split, part in numbers
        ),
    )

    def on_shard(sidecar: Sidecar) -> None:
        published.append(sidecar)
        progress.wrote(sidecar.tokens, sidecar.bytes)

    sequences = (split[number] for split, part in numbers for number in part)
    _show(splits[plans[0].split][plans[0].sequences.start], tokenizer)
    collector = ShardCollector(config.out, plans, spec=spec, on_shard=on_shard)
    try:
        with collector:
            for split_name, row in _rows(sequences, engine, spec):
                collector.add(split_name, row)
                entries = 0 if row.ids is None else len(row.ids)
                progress.scored(len(row.tokens) - 1, entries)
            collector.close()
    except (OSError, ValueError) as error:
        raise RunError(f"{type(error).__name__}: {error}; finished shards are kept") from error
    finally:
        progress.finish()
    return DumpSummary(
        out=config.out,
        sequences=progress.sequences,
        positions=progress.positions,
        tokens=sum(sidecar.tokens for sidecar in published),
        entries=sum(sidecar.entries for sidecar in published),
        bytes=sum(sidecar.bytes for sidecar in published),
        shards=len(published),
        seconds=progress.seconds,
    )


def _rows(
    sequences: Iterator[TokenSequence], engine: TeacherEngine | None, spec: DatasetSpec
) -> Iterator[tuple[str, Row]]:
    """The rows of sequences with their splits, in any order."""
    if engine is None:
        for sequence in sequences:
            yield sequence.split, row_of_tokens(sequence)
        return
    for sequence, selected in engine.score(sequences):
        yield sequence.split, make_row(sequence, selected, spec.keep.logprob_step)


def _show(sequence: TokenSequence, tokenizer: TeacherTokenizer) -> None:
    """Log how the first sequence reads, which is what the teacher sees."""
    tokens = sequence.tokens[:_SHOWN_CHARACTERS].tolist()
    text = tokenizer.backend.decode(tokens, skip_special_tokens=False)
    shown = text[:_SHOWN_CHARACTERS]
    logger.info("%s sequence %d begins: %r", sequence.split, sequence.number, shown)
