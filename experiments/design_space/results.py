"""The rows of the results: one CSV line per finished run, appended so that a kill loses none."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

COLUMNS = (
    *("settings", "text", "question", "cell", "seed"),
    *("cross_entropy", "kl", "top1_agreement", "calibration_error", "teacher_cross_entropy"),
    *("bytes_per_token", "entries_per_token", "parameters", "tokens", "seconds"),
    *("logits", "dump", "train", "scale", "commit", "machine"),
)
Row = Mapping[str, str]


def read(path: Path) -> list[Row]:
    """All complete rows; none if there is no file. The line of a killed run is not one."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(io.StringIO(complete, newline="")))


def append(path: Path, row: Mapping[str, object]) -> None:
    """Write a row to the disk, below the complete ones. ValueError for an unknown column."""
    line = io.StringIO(newline="")
    writer = csv.DictWriter(line, COLUMNS, lineterminator="\n")
    with path.open("ab+") as stream:
        stream.seek(0)
        content = stream.read()
        stream.truncate(content.rfind(b"\n") + 1)
        if b"\n" not in content:
            writer.writeheader()
        writer.writerow(row)
        stream.write(line.getvalue().encode())
        stream.flush()
        os.fsync(stream.fileno())
