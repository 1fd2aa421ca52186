"""The sequences of a batch as their datasets have them, for what writes them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shards.row_group import require
from shards.rows import BoolArray, Int32Array
from shards.schema import TOKENS
from student_train.data.lines import Line


class WholeLine(NamedTuple):
    """tokens and segments [n], loss_mask [n - 1] of a sequence; None: every position counts.

    `number` is that of its line among all lines of its step, from 0, whatever rank takes it.
    """

    number: int
    tokens: Int32Array
    segments: Int32Array
    loss_mask: BoolArray | None


def whole_lines(numbers: Sequence[int], lines: Sequence[Line]) -> tuple[WholeLine, ...]:
    """Copies of lines of one sequence each; none if the segments were not read."""
    if lines[0][0][0].segments is None:
        return ()
    return tuple(_whole(number, line) for number, line in zip(numbers, lines, strict=True))


def _whole(number: int, line: Line) -> WholeLine:
    ((group, r),) = line
    offsets = require(TOKENS, group.token_offsets)
    positions = require(TOKENS, group.position_offsets)
    mask, tokens = group.loss_mask, slice(offsets[r], offsets[r + 1])
    return WholeLine(
        number=number,
        tokens=require(TOKENS, group.tokens)[tokens].copy(),
        segments=require("segments", group.segments)[tokens].copy(),
        loss_mask=None if mask is None else mask[positions[r] : positions[r + 1]].copy(),
    )
