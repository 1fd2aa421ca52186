"""Read the lines of metrics.jsonl and speed.jsonl, for a report or for the run itself.

The run may still be writing or have been killed, so this leaves out a last line that is incomplete.
A complete line that cannot be read is an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shards.errors import InputError


class FigureLine(NamedTuple):
    """A line as it stands in the file, and what it says: step, kind, figures."""

    text: bytes
    figures: dict[str, Any]


def read_lines(file: Path) -> Iterator[FigureLine]:
    """The whole lines of a file; none if there is no file, as of a run that has just begun.

    InputError, with the number of the line, for one that is not of figures.
    """
    if not file.is_file():
        return
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.endswith(b"\n"):
                    yield FigureLine(line, _parse(line, f"{file}:{number}"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error


def is_number(value: object) -> bool:
    """A finite number in the range of a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def _parse(text: bytes, location: str) -> dict[str, Any]:
    try:
        line: dict[str, Any] = json.loads(text)
        sound = isinstance(line["step"], int) and isinstance(line["kind"], str)
        if sound and (line["kind"] == "validation" or is_number(line["tokens"])):
            return line
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise InputError(
        f"{location}: not a line of figures (step, kind, tokens); delete the line, and the run and"
        " its report do without it"
    )
