"""A sequence and what was selected of its positions -> the shard's row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.rows import BoolArray, Int32Array, Row
from teacher_dump.keep.packed import Selected, round_to_step


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """tokens [n] int32 with 2 <= n <= L + 1; the teacher reads tokens[:-1] and predicts tokens[1:].

    `segments` [n] int32 numbers the documents of the sequence from 0; an end-of-document token
    belongs to the document it ends, a BOS token to the one that follows. `loss_mask` [n - 1] says
    which labels count, None: all.
    """

    split: str
    number: int
    tokens: Int32Array
    segments: Int32Array
    loss_mask: BoolArray | None = None


def make_row(sequence: TokenSequence, selected: Selected, logprob_step: float) -> Row:
    """The shard's row of a scored sequence; sums are taken before anything is rounded.

    Where the sequence's `loss_mask` is false nothing is kept, and the sums leave it out.
    """
    counted: BoolArray | slice = slice(None)
    counts, ids, logprobs = selected.counts, selected.ids, selected.logprobs
    if sequence.loss_mask is not None:
        counted = sequence.loss_mask
        kept = np.repeat(counted, counts)
        counts, ids, logprobs = np.where(counted, counts, 0), ids[kept], logprobs[kept]
    nll = -float(selected.label_logprobs[counted].sum(dtype=np.float64))
    entropy, tail = selected.entropy, selected.tail_logmass
    entropies = None
    if entropy is not None:
        entropies = np.zeros_like(entropy)
        entropies[counted] = round_to_step(entropy[counted], logprob_step)
    return Row(
        sequence=sequence.number,
        tokens=sequence.tokens,
        segments=sequence.segments,
        counts=counts,
        ids=ids,
        logprobs=logprobs,
        tail_logmass=None if tail is None else round_to_step(tail, logprob_step),
        label_logprobs=round_to_step(selected.label_logprobs, logprob_step),
        entropies=entropies,
        loss_mask=sequence.loss_mask,
        teacher_nll=nll,
        teacher_entropy=(
            None if entropy is None else float(entropy[counted].sum(dtype=np.float64))
        ),
    )


def row_of_tokens(sequence: TokenSequence) -> Row:
    """The row of a sequence without a teacher."""
    return Row(
        sequence=sequence.number,
        tokens=sequence.tokens,
        segments=sequence.segments,
        loss_mask=sequence.loss_mask,
    )
