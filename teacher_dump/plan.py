"""Estimate what a dump will cost: `dump-logits --plan`.

It counts the tokens of a small corpus, and estimates those of a larger one from the fronts of files
spread over it. Entries, bytes and speed come from a short real pass over the sampled text, with the
engine of the dump, into a shard in a temporary folder. It writes nothing to `--out`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.errors import InputError
from shards.layout import Layout
from shards.process.progress import count, duration
from shards.rows import Row
from shards.sidecar import Sidecar
from shards.spec import TRAIN, DatasetSpec, Model, Tokenizer
from shards.writer import ShardWriter
from teacher_dump.bos import BosProbe, probe, read_probe_sample
from teacher_dump.config import DumpConfig
from teacher_dump.corpus.summary import CorpusSummary
from teacher_dump.keep.rows import TokenSequence
from teacher_dump.prepare import Prepared, prepare
from teacher_dump.processes.devices import count_gpus
from teacher_dump.sample import read_corpus_sample
from teacher_dump.shard_pass import rows
from teacher_dump.tokens.sequences import SplitSequences

MEASURED_SECONDS = 20.0
MEASURED_POSITIONS = 1 << 20  # more are not kept in memory, however fast the engine is
_WARM_UP = 2  # sequences before the clock runs


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to expect of a dump. Sizes in bytes, times in seconds.

    Positions are labelled ones, all that the teacher scores; tokens are those that count, which a
    mask may make fewer.
    """

    corpus: CorpusSummary
    positions: int
    source: str
    shards: int
    measured_positions: int
    measured_tokens: int
    entries_per_token: float
    bytes_per_token: float
    positions_per_s: float
    start_seconds: float
    engines: int = 1
    gpus_per_engine: int = 0
    probe: BosProbe | None = None

    @property
    def tokens(self) -> int:
        return round(self.positions * self.measured_tokens / self.measured_positions)

    @property
    def bytes(self) -> float:
        return self.tokens * self.bytes_per_token

    @property
    def seconds(self) -> float:
        return self.start_seconds + self.positions / (self.positions_per_s * self.engines)

    @property
    def days_per_billion(self) -> float:
        """Days of one engine per billion positions."""
        return 1e9 / self.positions_per_s / 86400

    def lines(self) -> list[str]:
        """For a person."""
        days = self.seconds / 86400
        long = f", {days:,.1f} days" if days > 2 else ""
        together = "" if self.engines == 1 else f" with {self.engines:,} engines"
        per_engine = -(-self.shards // self.engines)
        cost, unit = self.days_per_billion, "engine"
        if self.gpus_per_engine:
            cost, unit = cost * self.gpus_per_engine, "GPU"
        of = "" if self.tokens == self.positions else f", labels of {count(self.positions)}"
        return [
            *self.corpus.lines(),
            f"tokens         {count(self.tokens)} {self.source}{of}",
            f"entries/token  {self.entries_per_token:.1f}"
            f" (measured on {self.measured_positions:,} positions)",
            f"bytes/token    {self.bytes_per_token:.1f}",
            f"size           {_size(self.bytes)} in {self.shards:,}"
            f" shard{'' if self.shards == 1 else 's'}",
            f"speed          {self.positions_per_s:,.0f} tokens/s with this engine on this machine",
            f"cost           {cost:.3g} {unit}-days per billion tokens",
            f"time           {duration(self.seconds)}{long}{together}",
            *([] if self.engines == 1 else [f"shards/engine  {per_engine:,}"]),
            *([] if self.probe is None else [self.probe.text()]),
        ]


def make_plan(config: DumpConfig, tokens: int | None, engines: int = 1) -> Plan:
    """Plan the dump of `config` by `engines` engines at once; it measures one.

    `tokens` is the size of a corpus that is not all here.

    Raises InputError for what the dump would reject, and for text too short to measure anything.
    """
    ready = prepare(config)
    sample = read_corpus_sample(ready)
    split = sample.sequences(config, ready.bos_before_sequences)
    if not len(split):
        raise InputError("--plan: the sample of the corpus has no two tokens to measure with")
    probe_sample = read_probe_sample(ready)
    started = time.monotonic()
    engine = None if ready.teacher is None else ready.start_engine(config)
    start_seconds = time.monotonic() - started
    probed = None if engine is None else probe(config, ready, probe_sample, engine)

    for _ in rows((split[n] for n in range(min(_WARM_UP, len(split)))), engine, config):
        pass
    started = time.monotonic()
    sequences = _until(split, started + MEASURED_SECONDS)
    found = sorted((row for _, row in rows(sequences, engine, config)), key=lambda r: r.sequence)
    seconds = time.monotonic() - started
    measured = _write(ready, config, found)
    if not measured.tokens:
        raise InputError("--plan: the sample of the corpus has no label that counts")
    num_positions = sum(len(row.tokens) - 1 for row in found)
    total, source = _total(config, tokens, sample.num_positions(split), sample.share)
    layout = config.layout(split.mean_positions)
    return Plan(
        corpus=ready.corpus,
        positions=total,
        source=source,
        shards=layout.num_shards(-(-total // split.mean_positions)),
        measured_positions=num_positions,
        measured_tokens=measured.tokens,
        entries_per_token=measured.entries / measured.tokens,
        bytes_per_token=measured.bytes / measured.tokens,
        positions_per_s=num_positions / seconds,
        start_seconds=start_seconds,
        engines=engines,
        gpus_per_engine=min(config.gpus, count_gpus()) if ready.teacher is not None else 0,
        probe=probed,
    )


def _until(split: SplitSequences, deadline: float) -> Iterator[TokenSequence]:
    for number in range(len(split)):
        if time.monotonic() > deadline or split.positions_of(number) > MEASURED_POSITIONS:
            return
        yield split[number]


def _total(config: DumpConfig, given: int | None, total: int, share: float) -> tuple[int, str]:
    """Labelled positions of the whole dump, and where the number comes from."""
    expected = total if given is None else given
    if config.max_tokens is not None and config.max_tokens < expected:
        return config.max_tokens, "by --max-tokens"
    if given is not None:
        return given, "as given"
    if share == 1:
        return total, "counted"
    return total, f"estimated from {100 * share:.2g} % of the corpus"


def _write(ready: Prepared, config: DumpConfig, rows: list[Row]) -> Sidecar:
    """Write the rows to a shard that is thrown away, for its size."""
    unknown = "0" * 64
    spec = DatasetSpec(
        teacher=None
        if ready.teacher is None
        else Model(
            config_sha256=unknown,
            weights_sha256=unknown,
            revision=None,
            dtype=config.resolved_dtype,
            head_dtype="float32",
            entropies=config.sees_distribution,
        ),
        tokenizer=Tokenizer(sha256=unknown, vocab_size=ready.tokenizer.vocab_size),
        documents=ready.documents,
        keep=config.keep,
        layout=Layout(sequences_per_shard=len(rows), sequences_per_row_group=len(rows)),
        sequence_length=config.sequence_length,
        seed=config.seed,
        tokens_sha256=unknown,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        ShardWriter(Path(folder) / TRAIN, shard=0, split=TRAIN, spec=spec) as writer,
    ):
        writer.write_rows(rows)
        return writer.publish()


def _size(num_bytes: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"
