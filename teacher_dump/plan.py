"""What a dump will cost, before anything is spent: `dump-logits --plan`.

Tokens are counted where the corpus is small, else estimated from the fronts of files spread over
it. Entries, bytes and speed are those of a short real pass over the sampled text: the engine that
the dump would use, rows written to a shard in a temporary folder. Nothing is written to `--out`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.errors import InputError
from shards.progress_line import count, duration
from shards.rows import Row
from shards.schema import TEACHER_ENTROPY
from shards.sidecar import Sidecar
from shards.writer import ShardWriter
from teacher_dump.collector import make_row
from teacher_dump.config import DumpConfig
from teacher_dump.corpus import read_sample
from teacher_dump.corpus_listing import CorpusFile
from teacher_dump.corpus_summary import CorpusSummary
from teacher_dump.prepare import Prepared, prepare
from teacher_dump.sequences import SplitSequences, TokenSequence, cut
from teacher_dump.token_builder import Encoded, encode, make_encoder

SAMPLED_FILES = 32
SAMPLED_CHARACTERS = 4 << 20
MEASURED_SECONDS = 20.0
MEASURED_POSITIONS = 1 << 20  # more are not kept in memory, however fast the engine is
_WARM_UP = 2  # sequences before the clock runs


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Tokens [N] int32 of the sampled documents, document_starts [documents] int64.

    label_mask [N] says which of them count as labels, None: all. `num_tokens` is that of the whole
    corpus, exact if `share`, the part that was read, is 1.
    """

    tokens: npt.NDArray[np.int32]
    document_starts: npt.NDArray[np.int64]
    label_mask: npt.NDArray[np.bool_] | None
    num_tokens: int
    share: float

    def sequences(self, config: DumpConfig) -> SplitSequences:
        """The sample cut as the corpus would be."""
        return cut(
            joined=config.joined,
            split="train",
            tokens=self.tokens,
            document_starts=self.document_starts,
            label_mask=self.label_mask,
            sequence_length=config.sequence_length,
        )

    def num_positions(self, split: SplitSequences) -> int:
        """Labelled positions of the whole corpus: so many less than tokens as in the sample."""
        lost = len(self.tokens) - split.num_positions
        return max(1, self.num_tokens - round(lost * self.num_tokens / len(self.tokens)))


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

    @property
    def tokens(self) -> int:
        return round(self.positions * self.measured_tokens / self.measured_positions)

    @property
    def bytes(self) -> float:
        return self.tokens * self.bytes_per_token

    @property
    def seconds(self) -> float:
        return self.start_seconds + self.positions / self.positions_per_s

    def lines(self) -> list[str]:
        """For a person."""
        days = self.seconds / 86400
        long = f", {days:,.1f} days" if days > 2 else ""
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
            f"time           {duration(self.seconds)}{long}",
        ]


def make_plan(config: DumpConfig, tokens: int | None) -> Plan:
    """Plan the dump of `config`; `tokens` stands for a corpus that is not all here.

    Raises InputError for what the dump would refuse, and for text too short to measure anything.
    """
    ready = prepare(config)
    sample = read_corpus_sample(ready)
    split = sample.sequences(config)
    if not len(split):
        raise InputError("--plan: the corpus has no two tokens to measure with")
    started = time.monotonic()
    engine = ready.start_engine(config)
    start_seconds = time.monotonic() - started

    for _ in engine.score(split[n] for n in range(min(_WARM_UP, len(split)))):
        pass
    rows = []
    started = time.monotonic()
    for sequence, selected in engine.score(_until(split, started + MEASURED_SECONDS)):
        rows.append(make_row(sequence, selected, config.logprob_step))
    seconds = time.monotonic() - started
    measured = _write(ready, config, sorted(rows, key=lambda row: row.sequence))
    if not measured.tokens:
        raise InputError("--plan: no label counts in what was read of the corpus")
    num_positions = sum(len(row.counts) for row in rows)
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
    )


def _until(split: SplitSequences, deadline: float) -> Iterator[TokenSequence]:
    for number in range(len(split)):
        if time.monotonic() > deadline or split.positions_of(number) > MEASURED_POSITIONS:
            return
        yield split[number]


def _total(config: DumpConfig, given: int | None, total: int, share: float) -> tuple[int, str]:
    """Labelled positions of the whole dump, and where the number comes from."""
    if given is not None:
        return given, "as given"
    if config.max_tokens is not None and config.max_tokens < total:
        return config.max_tokens, "by --max-tokens"
    if share == 1:
        return total, "counted"
    return total, f"estimated from {100 * share:.2g} % of the corpus"


def read_corpus_sample(ready: Prepared) -> Sample:
    """Tokenise the fronts of files spread over the corpus, and extrapolate by the files' sizes."""
    files = _spread(ready.files, SAMPLED_FILES)
    encoder = make_encoder(ready.tokenizer)
    pieces: list[Encoded] = []
    estimate = 0.0
    read_bytes = 0.0
    for file in files:
        documents, share = read_sample(file, ready.rules, SAMPLED_CHARACTERS // len(files))
        for document in encode(documents, encoder, ready.rules):
            if document is not None:
                copies = ready.rules.num_copies(document.content, file.weight)
                estimate += copies * len(document.tokens) / share
                pieces.append(document)
        read_bytes += share * file.path.stat().st_size
    all_bytes = sum(file.path.stat().st_size for file in ready.files)
    sampled_bytes = sum(file.path.stat().st_size for file in files)
    ends = np.cumsum([0, *(len(piece.tokens) for piece in pieces)], dtype=np.int64)
    masks = [piece.mask for piece in pieces if piece.mask is not None]
    return Sample(
        tokens=np.concatenate([*(piece.tokens for piece in pieces), np.empty(0)]).astype(np.int32),
        document_starts=ends[:-1],
        label_mask=np.concatenate(masks) if masks else None,
        num_tokens=round(estimate * all_bytes / max(1, sampled_bytes)),
        share=read_bytes / max(1, all_bytes),
    )


def _spread(files: Sequence[CorpusFile], most: int) -> list[CorpusFile]:
    if len(files) <= most:
        return list(files)
    return [files[number * len(files) // most] for number in range(most)]


def _write(ready: Prepared, config: DumpConfig, rows: list[Row]) -> Sidecar:
    """Write the rows to a shard that is thrown away, for its size."""
    layout = {"sequences_per_shard": len(rows), "sequences_per_row_group": len(rows)}
    with (
        tempfile.TemporaryDirectory() as folder,
        ShardWriter(
            Path(folder) / "train",
            shard=0,
            split="train",
            identity={
                "vocab_size": ready.rules.vocab_size,
                "layout": layout,
                TEACHER_ENTROPY: config.has_entropy,
            },
            sequences_per_row_group=len(rows),
        ) as writer,
    ):
        writer.write_rows(rows)
        return writer.publish()


def _size(num_bytes: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"
