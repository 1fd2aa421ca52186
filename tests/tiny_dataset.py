"""Small complete datasets for tests: a random bigram model is the teacher, so they can be learned.

The teacher's distribution over the next token depends on the current token alone and is known
exactly, which gives tests something to compare with.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shards.folder.completeness import missing_shards
from shards.folder.continuing import create_or_continue, record_completeness
from shards.keep import Keep, Threshold, Tokens, TopPK
from shards.layout import Layout
from shards.manifest import SplitSize
from shards.rows import Row
from shards.spec import DatasetSpec, Documents, Model, Tokenizer
from shards.tokenizer.content import tokenizer_sha256
from shards.tokenizer.files import hash_files
from shards.writer import ShardWriter

VOCAB_SIZE = 61  # no multiple of anything, so that a padded vocabulary shows
SEQUENCE_LENGTH = 16
EOS_TOKEN_ID = 0
TOP_K = 8
LOGPROB_STEP = 1 / 16
LOG_THRESHOLD = -2.0

TOP_P_K = TopPK(top_p=1.0, top_k=TOP_K, logprob_step=LOGPROB_STEP)
THRESHOLD = Threshold(threshold=float(np.exp(LOG_THRESHOLD)), logprob_step=LOGPROB_STEP)


def make_tokenizer(folder: Path, *, prefix: str = "word") -> str:
    """Save a tokenizer of VOCAB_SIZE whole words and return its identity."""
    words = ["<eos>"] + [f"{prefix}{number}" for number in range(1, VOCAB_SIZE)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, "<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(folder)
    return tokenizer_sha256(fast.backend_tokenizer.to_str())


def teacher_logprobs(seed: int = 0) -> npt.NDArray[np.float64]:
    """The bigram teacher: log-probabilities of the next token, [VOCAB_SIZE, VOCAB_SIZE]."""
    logits = np.random.default_rng(seed).normal(scale=2.5, size=(VOCAB_SIZE, VOCAB_SIZE))
    table: npt.NDArray[np.float64] = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return table


def make_row(
    sequence: int,
    num_tokens: int,
    *,
    seed: int = 0,
    split: str = "train",
    masked: bool = False,
    sampled: bool = False,
) -> Row:
    """One sequence drawn from the teacher, with its top TOP_K entries kept, or a sample of all."""
    table = teacher_logprobs()
    random = np.random.default_rng([seed, split == "train", sequence])
    tokens = np.empty(num_tokens, np.int32)
    tokens[0] = random.integers(VOCAB_SIZE)
    for t in range(1, num_tokens):
        tokens[t] = random.choice(VOCAB_SIZE, p=np.exp(table[tokens[t - 1]]))
    logprobs = table[tokens[:-1]]
    loss_mask = random.random(num_tokens - 1) < 0.8 if masked else None
    counted = np.ones(num_tokens - 1, np.bool_) if loss_mask is None else loss_mask
    # A count that varies, as top-p's does: ragged rows are what there is to get wrong.
    counts = np.where(counted, random.integers(1, TOP_K + 1, num_tokens - 1), 0)
    order = np.lexsort((np.broadcast_to(np.arange(VOCAB_SIZE), logprobs.shape), -logprobs))
    kept = [order[t, : counts[t]] for t in range(num_tokens - 1)]
    if sampled:
        weights = np.maximum(logprobs, LOG_THRESHOLD)
        hit = (random.random(logprobs.shape) < np.exp(logprobs - weights)) & counted[:, None]
        order = np.lexsort((np.broadcast_to(np.arange(VOCAB_SIZE), weights.shape), -weights))
        kept = [order[t][hit[t, order[t]]] for t in range(num_tokens - 1)]
        counts = hit.sum(1)
    else:
        weights = logprobs
    exact = [weights[t, ids] for t, ids in enumerate(kept)]
    label = logprobs[np.arange(num_tokens - 1), tokens[1:]]
    entropies = -(np.exp(logprobs) * logprobs).sum(1)
    return Row(
        sequence=sequence,
        tokens=tokens,
        segments=np.cumsum(np.append(0, tokens[:-1] == EOS_TOKEN_ID)).astype(np.int32),
        counts=counts.astype(np.int32),
        ids=np.concatenate(kept).astype(np.int32),
        logprobs=_rounded(np.concatenate(exact)),
        tail_logmass=None
        if sampled
        else _rounded(np.array([np.log1p(-np.exp(values).sum()) for values in exact])),
        label_logprobs=_rounded(label),
        entropies=_rounded(np.where(counted, entropies, 0)),
        loss_mask=loss_mask,
        teacher_nll=float(-label[counted].sum()),
        teacher_entropy=float(entropies[counted].sum()),
    )


def make_dataset(
    path: Path,
    *,
    train: int = 22,
    validation: int = 5,
    sequences_per_shard: int = 7,
    sequences_per_row_group: int = 3,
    masked: bool = False,
    sampled: bool = False,
    separate: bool = False,
    tokens_only: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
) -> Path:
    """Write a complete dataset of SEQUENCE_LENGTH positions a sequence; the last of each is short.

    Those of separate documents have any number of positions from 1 on.

    The layout leaves short row groups at the end of every shard. Returns `path`.
    """
    layout = Layout(
        sequences_per_shard=sequences_per_shard, sequences_per_row_group=sequences_per_row_group
    )
    keep: Keep = replace(THRESHOLD, temperature=temperature) if sampled else TOP_P_K
    keep = Tokens() if tokens_only else keep
    spec = _spec(path, layout, keep, joined=not separate, masked=masked, seed=seed)
    sizes = {"train": train, "validation": validation}
    lengths = {split: _lengths(size, separate) for split, size in sizes.items()}
    splits = {
        split: SplitSize(sequences=size, positions=sum(lengths[split]))
        for split, size in sizes.items()
    }
    hashes = hash_files(path / "tokenizer")
    manifest = create_or_continue(path, spec, splits, {"engine": "bigram"}, hashes)
    for split in sizes:
        for shard, sequences in missing_shards(path, manifest, split):
            with ShardWriter(path / split, shard=shard, split=split, spec=spec) as writer:
                rows = [
                    make_row(
                        sequence,
                        lengths[split][sequence] + 1,
                        seed=seed,
                        split=split,
                        masked=masked,
                        sampled=sampled,
                    )
                    for sequence in sequences
                ]
                if tokens_only:
                    rows = [without_teacher(row) for row in rows]
                for first in range(0, len(rows), sequences_per_row_group):
                    writer.write_rows(rows[first : first + sequences_per_row_group])
                writer.publish()
    record_completeness(path, manifest)
    return path


def without_teacher(row: Row) -> Row:
    """The tokens of a row alone."""
    return Row(
        sequence=row.sequence,
        tokens=row.tokens,
        segments=row.segments,
        loss_mask=row.loss_mask,
    )


def _spec(
    path: Path, layout: Layout, keep: Keep, *, joined: bool, masked: bool, seed: int
) -> DatasetSpec:
    return DatasetSpec(
        teacher=None
        if isinstance(keep, Tokens)
        else Model(
            config_sha256="",
            weights_sha256="bigram",
            revision=None,
            dtype="float64",
            head_dtype="float64",
        ),
        tokenizer=Tokenizer(sha256=make_tokenizer(path / "tokenizer"), vocab_size=VOCAB_SIZE),
        documents=Documents(
            joined=joined,
            bos="none",
            bos_token_id=None,
            eos_token_id=EOS_TOKEN_ID,
            held_out=0.1,
            masked=masked,
        ),
        keep=keep,
        layout=layout,
        sequence_length=SEQUENCE_LENGTH,
        seed=seed,
        tokens_sha256=str(seed),
    )


def _lengths(num_sequences: int, separate: bool) -> list[int]:
    """Labelled positions of every sequence of a split."""
    if separate:
        random = np.random.default_rng(num_sequences)
        drawn: list[int] = random.integers(1, SEQUENCE_LENGTH + 1, num_sequences).tolist()
        return drawn
    return ([SEQUENCE_LENGTH] * num_sequences + [SEQUENCE_LENGTH - 5])[-num_sequences:]


def _rounded(logprobs: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """float32, to a multiple of LOGPROB_STEP as the format wants it."""
    return (np.rint(logprobs / LOGPROB_STEP) * LOGPROB_STEP).astype(np.float32)
