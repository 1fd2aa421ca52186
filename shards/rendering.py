"""Descriptions and rows as text for a terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from shards.keep import Keep
from shards.row_group import require
from shards.rows import Row

_MAX_TEXT = 14


def render(description: Mapping[str, Any]) -> str:
    """What `describe` returned, as lines of text: figures by split, columns, spec."""
    splits = description.get("splits", {description.get("split", ""): description})
    lines = [_table(splits), "", "bytes per token by column"]
    columns = sorted(description["columns"].items(), key=lambda item: -(item[1] or 0.0))
    lines += [f"  {name:<20}{_number(size):>12}" for name, size in columns]
    lines += ["", "made from"]
    lines += [f"  {line}" for line in _flat(description["spec"])]
    for recorded in description.get("recorded", []):
        lines += ["", "made with"]
        lines += [f"  {line}" for line in _flat(recorded)]
    return "\n".join(lines)


def format_row(
    row: Row, keep: Keep, decode: Callable[[int], str], *, num_predictions: int = 5
) -> str:
    """One line per position: the token, the label with its probability, the leading predictions.

    `decode` gives the text of one token id. Probabilities are in percent, as the teacher had them
    after reading the token on the left of the line and all before it. That of the label is at
    temperature 1, those of predictions at the temperature of the dump. A `~` stands before the
    weight of an entry that was drawn by chance. A label that does not count has a `-`.
    """
    lines = [f"sequence {row.sequence}: {len(row.tokens) - 1} positions", ""]
    if row.counts is None:
        pairs = itertools.pairwise(row.tokens)
        lines.append(f"{'token':<18}label")
        return "\n".join([*lines, *(f"{_text(decode, a):<18}{_text(decode, b)}" for a, b in pairs)])
    ids, logprobs = require("ids", row.ids), require("logprobs", row.logprobs)
    label_logprobs = require("label_logprobs", row.label_logprobs)
    bounds = np.concatenate([[0], np.cumsum(row.counts)])
    exact_above = math.inf if keep.exact_above is None else keep.exact_above
    heat = "" if keep.temperature == 1 else f" at temperature {keep.temperature:g}"
    note = "; ~ drawn by chance" if keep.is_sampled else ""
    lines.append(f"{'token':<18}{'label':<18}{'label %':>8}   leading predictions{heat}, %{note}")
    for t, (start, stop) in enumerate(itertools.pairwise(bounds)):
        stop = min(stop, start + num_predictions)
        predictions = [
            f"{_text(decode, ids[e])} {'' if logprobs[e] > exact_above else '~'}"
            f"{100 * math.exp(logprobs[e]):.1f}"
            for e in range(start, stop)
        ]
        counts = row.loss_mask is None or row.loss_mask[t]
        label = f"{100 * math.exp(label_logprobs[t]):.2f}" if counts else "-"
        lines.append(
            f"{_text(decode, row.tokens[t]):<18}{_text(decode, row.tokens[t + 1]):<18}"
            f"{label:>8}   {'  '.join(predictions)}".rstrip()
        )
    return "\n".join(lines)


def _table(splits: Mapping[str, Mapping[str, Any]]) -> str:
    rows = {
        "sequences": "sequences",
        "tokens": "labelled tokens",
        "entries_per_token": "entries per token",
        "kept_mass": "kept mass",
        "teacher_cross_entropy": "teacher cross-entropy, nats",
        "teacher_entropy": "teacher entropy, nats",
        "bytes": "bytes",
        "bytes_per_token": "bytes per token",
        "missing_shards": "missing shards",
    }
    lines = [" " * 28 + "".join(f"{name:>16}" for name in splits)]
    for key, title in rows.items():
        values = "".join(f"{_number(figures[key]):>16}" for figures in splits.values())
        lines.append(f"{title:<28}{values}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested keys as `keep.top_k: 100`."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {value}")
    return lines


def _text(decode: Callable[[int], str], token: np.int32) -> str:
    """A token on one line, quoted, so that spaces and line ends can be seen."""
    text = decode(int(token))
    return repr(text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 3]}...")
