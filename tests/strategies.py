"""Rows and datasets for tests: Hypothesis strategies, and examples that a seed determines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from shards import schema
from shards.folder.completeness import missing_shards
from shards.folder.continuing import create_or_continue, record_completeness
from shards.keep import Keep, Threshold, TopPK
from shards.layout import Layout
from shards.manifest import SplitSize
from shards.rows import Row
from shards.spec import DatasetSpec, Documents, Model, Tokenizer
from shards.writer import ShardWriter

# Small ones, so that everything can be kept, and ones on both sides of 16 bits and of 131,072.
VOCAB_SIZES = (1, 2, 7, 49_152, 65_537, 151_936)


def make_spec(
    *,
    vocab_size: int = 151_936,
    sequences_per_shard: int = 8,
    sequences_per_row_group: int = 3,
    has_entropy: bool = True,
    has_mask: bool = False,
    keep: Keep | None = None,
    **changes: Any,
) -> DatasetSpec:
    """A description with every key that the teacher pass writes."""
    spec = DatasetSpec(
        teacher=Model(
            config_sha256="11" * 32,
            weights_sha256="22" * 32,
            revision=None,
            dtype="float32",
            head_dtype="float32",
            entropies=has_entropy,
        ),
        tokenizer=Tokenizer(sha256="33" * 32, vocab_size=vocab_size),
        documents=Documents(
            joined=True,
            bos="none",
            bos_token_id=None,
            eos_token_id=0,
            held_out=0.01,
            masked=has_mask,
        ),
        keep=keep or TopPK(),
        layout=Layout(
            sequences_per_shard=sequences_per_shard,
            sequences_per_row_group=sequences_per_row_group,
        ),
        sequence_length=32,
        seed=0,
        tokens_sha256="44" * 32,
    )
    return replace(spec, **changes)


def columns_of(spec: DatasetSpec) -> dict[str, bool]:
    """Which optional columns of a teacher `rows` and `example_row` are to have."""
    return {
        "has_tail": spec.keep.has_tail,
        "has_mask": spec.documents.masked,
        "has_entropy": schema.ENTROPIES in spec.columns,
    }


def _float32(values: Sequence[float]) -> np.ndarray:
    return np.array(values, np.float32)


@st.composite
def rows(
    draw: st.DrawFn,
    *,
    sequence: int,
    vocab_size: int,
    has_tail: bool,
    has_mask: bool,
    has_entropy: bool,
) -> Row:
    """A row of 2 to 6 tokens, with 0 to 7 entries (all of a small vocabulary) at each position."""
    num_tokens = draw(st.integers(2, 6))
    token_ids = st.integers(0, vocab_size - 1)
    logprobs = st.floats(-60, 0, width=32)
    mask = draw(st.lists(st.booleans(), min_size=num_tokens - 1, max_size=num_tokens - 1))
    most = min(vocab_size, 7)
    counts, ids, values = [], [], []
    for counted in mask:
        count = draw(st.integers(0, most)) if counted or not has_mask else 0
        counts.append(count)
        ids += draw(st.lists(token_ids, min_size=count, max_size=count, unique=True))
        values += sorted(draw(st.lists(logprobs, min_size=count, max_size=count)), reverse=True)

    def per_position(elements: st.SearchStrategy[float]) -> np.ndarray:
        return _float32(draw(st.lists(elements, min_size=len(mask), max_size=len(mask))))

    return Row(
        sequence=sequence,
        tokens=np.array(
            draw(st.lists(token_ids, min_size=num_tokens, max_size=num_tokens)), np.int32
        ),
        segments=np.arange(num_tokens, dtype=np.int32) // 3,
        counts=np.array(counts, np.int32),
        ids=np.array(ids, np.int32),
        logprobs=_float32(values),
        tail_logmass=per_position(logprobs | st.just(-np.inf)) if has_tail else None,
        label_logprobs=per_position(logprobs),
        loss_mask=np.array(mask, np.bool_) if has_mask else None,
        entropies=per_position(st.floats(0, 12, width=32)) if has_entropy else None,
        teacher_nll=draw(st.floats(0, 1e6, width=32)),
        teacher_entropy=draw(st.floats(0, 1e6, width=32)) if has_entropy else None,
    )


@st.composite
def row_lists(draw: st.DrawFn, *, max_rows: int = 5) -> tuple[DatasetSpec, list[Row]]:
    """A description and the rows of one shard, from sequence 0 on."""
    vocab_size = draw(st.sampled_from(VOCAB_SIZES))
    spec = make_spec(
        vocab_size=vocab_size,
        has_entropy=draw(st.booleans()),
        has_mask=draw(st.booleans()),
        keep=draw(st.sampled_from([TopPK(), Threshold()])),
    )
    num_rows = draw(st.integers(1, max_rows))
    return spec, [
        draw(rows(sequence=i, vocab_size=vocab_size, **columns_of(spec))) for i in range(num_rows)
    ]


def example_row(
    sequence: int,
    *,
    num_tokens: int = 17,
    most_entries: int = 9,
    vocab_size: int = 151_936,
    has_tail: bool = True,
    has_mask: bool = False,
    has_entropy: bool = True,
) -> Row:
    """The same row for the same arguments, with 0 to `most_entries` entries at each position."""
    rng = np.random.default_rng(sequence)
    num_positions = num_tokens - 1
    counts = rng.integers(0, most_entries + 1, num_positions).astype(np.int32)
    mask = rng.random(num_positions) < 0.8 if has_mask else None
    if mask is not None:
        counts[~mask] = 0
    steps = [np.sort(rng.integers(-320, 0, count))[::-1] for count in counts]
    ids = [rng.choice(vocab_size, count, replace=False) for count in counts]
    nll, entropy = rng.random(2) * num_positions

    def rounded(values: np.ndarray) -> np.ndarray:
        return (values / 16).astype(np.float32)

    return Row(
        sequence=sequence,
        tokens=rng.integers(0, vocab_size, num_tokens).astype(np.int32),
        segments=np.cumsum(rng.random(num_tokens) < 0.1).astype(np.int32),
        counts=counts,
        ids=np.concatenate(ids).astype(np.int32),
        logprobs=rounded(np.concatenate(steps)),
        tail_logmass=rounded(rng.integers(-160, 0, num_positions)) if has_tail else None,
        label_logprobs=rounded(rng.integers(-320, 0, num_positions)),
        entropies=rounded(rng.integers(0, 160, num_positions)) if has_entropy else None,
        loss_mask=mask,
        teacher_nll=float(np.float32(nll)),
        teacher_entropy=float(np.float32(entropy)) if has_entropy else None,
    )


def write_shard(directory: Path, rows: Sequence[Row], spec: DatasetSpec, *, shard: int = 0) -> Path:
    """Write and publish one shard of the split that the folder is named after."""
    size = spec.layout.sequences_per_row_group
    with ShardWriter(directory, shard=shard, split=directory.name, spec=spec) as writer:
        for first in range(0, len(rows), size):
            writer.write_rows(rows[first : first + size])
        writer.publish()
        return writer.path


def write_dataset(path: Path, spec: DatasetSpec, **num_sequences: int) -> None:
    """Write, or continue, a dataset of example rows: `write_dataset(path, spec, train=20)`."""
    splits = {
        name: SplitSize(sequences=number, positions=16 * number)
        for name, number in num_sequences.items()
    }
    manifest = create_or_continue(path, spec, splits, {"engine": "example"}, {})
    for split in manifest.splits:
        for shard, sequences in missing_shards(path, manifest, split):
            rows_of_shard = [example_row(i, **columns_of(spec)) for i in sequences]
            write_shard(path / split, rows_of_shard, manifest.spec, shard=shard)
    (path / "tokenizer").mkdir(exist_ok=True)
    record_completeness(path, manifest)


def assert_rows_equal(found: Row, expected: Row) -> None:
    """Every field has the same type and the same bits."""
    for field in fields(Row):
        left, right = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(right, np.ndarray):
            assert left.dtype == right.dtype, field.name
            assert left.shape == right.shape, field.name
            assert left.tobytes() == right.tobytes(), field.name
        else:
            assert left == right, field.name
