"""Plain JSON: one text for equal values, and how two objects differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

# Plain JSON as Python reads it, read-only.
Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]

_ABSENT = "nothing"


def canonical_json(value: Json) -> str:
    """One text for equal values: sorted keys, no spaces, ASCII. ValueError for NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_differences(expected: Mapping[str, Json], actual: Mapping[str, Json]) -> list[str]:
    """One text per differing key, dotted: "keep.top_k: 100 here, 50 there" (expected, actual)."""
    lines: list[str] = []
    for key in sorted({*expected, *actual}):
        here, there = expected.get(key), actual.get(key)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            lines += [f"{key}.{line}" for line in json_differences(here, there)]
        elif key not in expected or key not in actual or not _same(here, there):
            here_text = _short(here) if key in expected else _ABSENT
            there_text = _short(there) if key in actual else _ABSENT
            lines.append(f"{key}: {here_text} here, {there_text} there")
    return lines


def _same(here: Json, there: Json) -> bool:
    """Equal as JSON: 1 is 1.0, but true is not 1 as it is in Python."""
    return here == there and isinstance(here, bool) == isinstance(there, bool)


def _short(value: Json) -> str:
    """A value for a one-line message; the beginning of a hash is enough."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 40 else f"{text[:16]}..."
