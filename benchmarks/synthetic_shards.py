"""A dataset of realistic shape without a teacher, for the benchmarks that read shards.

The number of kept entries follows what top-0.95-100 keeps of SmolLM2-135M on text: a third of the
positions reach 100, the others have a few; about 54 on average. Other averages have the same shape,
with `scale` times as many. Ids are Zipf-like, log-probabilities fall like a power of the rank and
are rounded to 1/16 nat.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.example_spec import example_spec
from shards.dataset import Dataset
from shards.folder.completeness import missing_shards
from shards.folder.continuing import create_or_continue, record_completeness
from shards.keep import TopPK
from shards.layout import Layout
from shards.manifest import SplitSize
from shards.rows import Row
from shards.spec import TRAIN
from shards.tokenizer.files import write_tokenizer
from shards.writer import ShardWriter

TOP_P, TOP_K = 0.95, 100
MEAN_ENTRIES = 54
LOGPROB_STEP = 1 / 16


def make_shards(
    path: Path,
    *,
    num_sequences: int,
    sequence_length: int,
    vocab_size: int,
    row_group_tokens: int = 128 << 10,
    entries: float = MEAN_ENTRIES,
    seed: int = 0,
) -> Dataset:
    """Write a complete dataset of one split in shards of 4 row groups."""
    scale = entries / MEAN_ENTRIES
    per_row_group = max(1, row_group_tokens // sequence_length)
    layout = Layout(sequences_per_shard=4 * per_row_group, sequences_per_row_group=per_row_group)
    spec = example_spec(
        keep=TopPK(top_p=TOP_P, top_k=round(scale * TOP_K), logprob_step=LOGPROB_STEP),
        layout=layout,
        vocab_size=vocab_size,
        sequence_length=sequence_length,
        seed=seed,
    )
    size = SplitSize(sequences=num_sequences, positions=num_sequences * sequence_length)
    write_tokenizer(path, {})
    manifest = create_or_continue(path, spec, {TRAIN: size}, {"engine": "synthetic"}, {})
    for shard, sequences in missing_shards(path, manifest, TRAIN):
        with ShardWriter(path / TRAIN, shard=shard, split=TRAIN, spec=spec) as writer:
            for first in range(sequences.start, sequences.stop, per_row_group):
                group = range(first, min(first + per_row_group, sequences.stop))
                writer.write_rows(
                    [_row(s, sequence_length, vocab_size, scale, seed) for s in group]
                )
            writer.publish()
    record_completeness(path, manifest)
    return Dataset.open(path)


def _row(sequence: int, length: int, vocab_size: int, scale: float, seed: int) -> Row:
    random = np.random.default_rng([seed, sequence])
    top_k = round(scale * TOP_K)
    few = np.minimum(top_k, random.geometric(1 / (30 * scale), length))
    counts = np.where(random.random(length) < 0.35, top_k, few)
    rank = np.arange(top_k)
    # A flat distribution is one that needs many entries for the same mass.
    slope = 0.5 + 4 * np.exp(-counts / (20 * scale))
    weights = (rank + 1.0) ** -slope[:, None] * (rank < counts[:, None])
    kept = TOP_P * weights / weights.sum(1, keepdims=True)
    inside = rank < counts[:, None]
    ids = (_zipf(random, (length, top_k), vocab_size) + 97 * rank) % vocab_size
    return Row(
        sequence=sequence,
        tokens=_zipf(random, (length + 1,), vocab_size).astype(np.int32),
        segments=np.zeros(length + 1, np.int32),
        counts=counts.astype(np.int32),
        ids=ids[inside].astype(np.int32),
        logprobs=_rounded(np.log(kept[inside])),
        tail_logmass=_rounded(np.full(length, np.log(1 - TOP_P))),
        label_logprobs=_rounded(-random.exponential(3.0, length)),
        entropies=_rounded(random.exponential(3.0, length)),
        teacher_nll=3.0 * length,
        teacher_entropy=3.0 * length,
    )


def _zipf(
    random: np.random.Generator, shape: tuple[int, ...], vocab_size: int
) -> npt.NDArray[np.int64]:
    """Integers below vocab_size, small ones far more often: log-uniform."""
    drawn: npt.NDArray[np.int64] = np.exp(random.random(shape) * np.log(vocab_size)).astype(
        np.int64
    )
    return drawn % vocab_size


def _rounded(logprobs: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return (np.rint(logprobs / LOGPROB_STEP) * LOGPROB_STEP).astype(np.float32)
