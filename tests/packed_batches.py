"""The sequences in a batch whose lines may hold several."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

from shards.rows import Row
from student_train.data.batches import Batch
from tests.kept_entries import batch_entries

Piece = tuple[torch.Tensor, ...]  # tokens, labels, ids, logprobs, tail_logmass


def spans(positions: torch.Tensor) -> list[tuple[int, int]]:
    """Where each sequence of a line begins and ends, and the padding after them."""
    return list(pairwise([*np.flatnonzero(positions == 0).tolist(), len(positions)]))


def pieces(batch: Batch) -> Iterator[tuple[int, Piece]]:
    """Line, and what is there of a sequence in it, without padding."""
    assert batch.position_ids is not None
    assert batch.tail_logmass is not None
    ids, logprobs = batch_entries(batch)
    for b, positions in enumerate(batch.position_ids):
        for first, last in spans(positions):
            part = (b, slice(first, last))
            assert positions[first:last].tolist() == list(range(last - first))
            if torch.isfinite(batch.tail_logmass[part]).any():  # else padding
                columns = (batch.input_ids, batch.labels, ids, logprobs, batch.tail_logmass)
                yield b, tuple(column[part] for column in columns)


def key(tokens: torch.Tensor) -> bytes:
    """Of a row by its tokens but the last."""
    return tokens.numpy().astype(np.int32).tobytes()


def assert_is_row(piece: Piece, row: Row) -> None:
    """The piece is this row, unshifted."""
    _, labels, ids, logprobs, tails = piece
    counted = True if row.loss_mask is None else row.loss_mask
    np.testing.assert_array_equal(labels, np.where(counted, row.tokens[1:], -100))
    np.testing.assert_array_equal(tails, row.tail_logmass)
    kept = torch.isfinite(logprobs)
    np.testing.assert_array_equal(kept.sum(1), row.counts)
    np.testing.assert_array_equal(ids[kept], row.ids)
    np.testing.assert_array_equal(logprobs[kept], row.logprobs)
