"""The checks that a teacher's numbers must pass, so that readers get valid distributions.

The writer runs them, while the source of a NaN is still known, and `verify_shard` runs them again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.row_group import Offsets, RowGroup, require
from shards.schema import (
    ENTROPIES,
    LABEL_LOGPROBS,
    LOGPROBS,
    TAIL_LOGMASS,
    TEACHER_ENTROPY,
    TEACHER_NLL,
)


class _Check(NamedTuple):
    """Which values are wrong, and where rows begin; `values` are the teacher's numbers."""

    wrong: npt.NDArray[np.bool_]
    row_offsets: Offsets
    what: str
    values: npt.NDArray[np.float32] | None = None

    def text(self, group: RowGroup) -> str:
        """The first place and what is wrong there."""
        position = int(self.wrong.argmax())
        row = int(np.searchsorted(self.row_offsets, position, side="right")) - 1
        sequence = f"sequence {group.sequences[row]}"
        if self.values is not None and np.isnan(self.values[position]):
            return f"{sequence}: {self.what} is nan: the teacher gave no number"
        return f"{sequence}: {self.what} is not valid"


def problem_with_values(group: RowGroup, vocab_size: int) -> str | None:
    """The first thing wrong with a group that has every column, naming its sequence, or None.

    Tokens and ids are below `vocab_size`; log-probabilities are finite and largest first; where
    `loss_mask` is false nothing is kept. A tail of minus infinity is fine: nothing was left out.
    A NaN of the teacher is in most columns; its own values are named before sums.
    """
    by_token = require("tokens", group.token_offsets)
    by_position = require("tokens", group.position_offsets)
    checks = [_Check(_outside(require("tokens", group.tokens), vocab_size), by_token, "a token")]
    checks += _finite(LABEL_LOGPROBS, group.label_logprobs, by_position)
    if group.entry_offsets is not None:
        checks += _entry_checks(group, group.entry_offsets, by_position, vocab_size)
    if group.tail_logmass is not None:
        tail = group.tail_logmass
        checks.append(_Check(~(tail < np.inf), by_position, TAIL_LOGMASS, tail))
    checks += _finite(ENTROPIES, group.entropies, by_position)
    by_row = np.arange(group.num_rows + 1)
    checks += _finite(TEACHER_NLL, group.teacher_nll, by_row)
    checks += _finite(TEACHER_ENTROPY, group.teacher_entropy, by_row)
    return next((check.text(group) for check in checks if check.wrong.any()), None)


def _entry_checks(
    group: RowGroup, entry_offsets: Offsets, by_position: Offsets, vocab_size: int
) -> list[_Check]:
    """What is wrong with kept entries."""
    logprobs = require("logprobs", group.logprobs)
    by_entry = entry_offsets[by_position]
    checks = [
        *_finite(LOGPROBS, logprobs, by_entry),
        _Check(_outside(require("ids", group.ids), vocab_size), by_entry, "a kept id"),
        _Check(_rises(logprobs, entry_offsets), by_entry, "the order of logprobs"),
    ]
    if group.loss_mask is not None:
        masked = ~group.loss_mask & (np.diff(entry_offsets) > 0)
        checks.append(_Check(masked, by_position, "an entry where loss_mask is false"))
    return checks


def _finite(
    column: str, values: npt.NDArray[np.float32] | None, row_offsets: Offsets
) -> list[_Check]:
    """That a column has finite numbers only, if it is there."""
    return [] if values is None else [_Check(~np.isfinite(values), row_offsets, column, values)]


def _outside(values: npt.NDArray[np.int32], size: int) -> npt.NDArray[np.bool_]:
    # Negative numbers are the largest ones when read as unsigned.
    return values.view(np.uint32) >= size


def _rises(logprobs: npt.NDArray[np.float32], entry_offsets: Offsets) -> npt.NDArray[np.bool_]:
    """Where an entry [E] is larger than the one before it at the same position."""
    rises = np.zeros(len(logprobs), np.bool_)
    np.greater(logprobs[1:], logprobs[:-1], out=rises[1:])
    rises[entry_offsets[entry_offsets < len(logprobs)]] = False
    return rises
