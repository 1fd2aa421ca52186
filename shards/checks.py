"""What the numbers of a teacher must satisfy to be read back as the distributions they were.

Asked before writing, where a NaN still has a culprit, and again by `verify_shard`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shards.row_group import Offsets, RowGroup, require


def problem_with_values(group: RowGroup, vocab_size: int) -> str | None:
    """The first thing wrong with a group that has every column, naming its sequence, or None.

    Tokens and ids are below `vocab_size`; log-probabilities are finite and largest first; where
    `loss_mask` is false nothing is kept. A tail of minus infinity is fine: nothing was left out.
    """
    logprobs = require("logprobs", group.logprobs)
    position_offsets = require("ids", group.position_offsets)
    entry_offsets = require("ids", group.entry_offsets)
    by_row = np.arange(group.num_rows + 1)
    by_token = require("tokens", group.token_offsets)
    by_entry = entry_offsets[position_offsets]

    checks: list[tuple[npt.NDArray[np.bool_], Offsets, str]] = [
        (_outside(require("tokens", group.tokens), vocab_size), by_token, "a token"),
        (_outside(require("ids", group.ids), vocab_size), by_entry, "a kept id"),
        (~np.isfinite(logprobs), by_entry, "a log-probability"),
        (_rises(logprobs, entry_offsets), by_entry, "the order of the log-probabilities"),
    ]
    if group.tail_logmass is not None:
        checks.append((~(group.tail_logmass < np.inf), position_offsets, "a tail_logmass"))
    if group.loss_mask is not None:
        masked = ~group.loss_mask & (np.diff(entry_offsets) > 0)
        checks.append((masked, position_offsets, "an entry where loss_mask is false"))
    labels = require("label_logprobs", group.label_logprobs)
    checks.append((~np.isfinite(labels), position_offsets, "a label's log-probability"))
    checks.append((~np.isfinite(require("teacher_nll", group.teacher_nll)), by_row, "teacher_nll"))
    if group.teacher_entropy is not None:
        checks.append((~np.isfinite(group.teacher_entropy), by_row, "teacher_entropy"))

    for wrong, offsets, what in checks:
        if wrong.any():
            row = int(np.searchsorted(offsets, wrong.argmax(), side="right")) - 1
            return f"sequence {group.sequences[row]}: {what} is not valid"
    return None


def _outside(values: npt.NDArray[np.int32], size: int) -> npt.NDArray[np.bool_]:
    # Negative numbers are the largest ones when read as unsigned.
    return values.view(np.uint32) >= size


def _rises(logprobs: npt.NDArray[np.float32], entry_offsets: Offsets) -> npt.NDArray[np.bool_]:
    """Where an entry [E] is larger than the one before it at the same position."""
    rises = np.zeros(len(logprobs), np.bool_)
    np.greater(logprobs[1:], logprobs[:-1], out=rises[1:])
    rises[entry_offsets[entry_offsets < len(logprobs)]] = False
    return rises
