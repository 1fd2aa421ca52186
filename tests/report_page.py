"""Folders of runs made from formulas, and a report's page taken apart again."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = ("meta", "input")


class Page(HTMLParser):
    """Checks that every tag is closed where it must be, and collects what the page holds.

    `charts` are Vega-Lite by title, `rows` the cells of the first row with a title, `marked` the
    titles of the rows that are marked as different.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.charts: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[str]] = {}
        self.marked: list[str] = []
        self.text = ""
        self._title = ""
        self._row: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append((tag, found))
        if tag == "tr":
            self._row = []
        elif tag in ("td", "th"):
            self._row.append("")
        elif tag == "h3":
            self._title = ""

    def handle_endtag(self, tag: str) -> None:
        name, attrs = self.open.pop()
        assert name == tag
        if tag == "tr":
            self.rows.setdefault(self._row[0], self._row[1:])
            self.marked += [self._row[0]] if attrs.get("class") == "differs" else []

    def handle_data(self, data: str) -> None:
        tag, attrs = self.open[-1] if self.open else ("", {})
        if attrs.get("type") == "application/json":
            self.charts[self._title] = json.loads(data)
        if tag in ("script", "style"):
            return
        self.text += data
        if tag == "h3":
            self._title += data
        elif tag in ("td", "th"):
            self._row[-1] += data

    def curves(self, title: str) -> dict[int, dict[str, list[float]]]:
        """The columns of a chart's data by run."""
        return {row["run"]: row for row in self.charts[title]["datasets"]["runs"]}

    def values(self, title: str, run: int = 0) -> list[tuple[float, float]]:
        """(tokens, value) of a curve."""
        columns = self.curves(title)[run]
        return list(zip(columns["tokens"], columns["mean"], strict=True))

    def layer(self, title: str, mark: str) -> dict[str, Any]:
        """The layer of a chart that draws this mark."""
        (found,) = [each for each in self.charts[title]["layer"] if each["mark"]["type"] == mark]
        layer: dict[str, Any] = found["encoding"]
        return layer

    def y_domain(self, title: str) -> tuple[float, float]:
        """The range of the y axis, the same of all layers."""
        encodings = [layer["encoding"] for layer in self.charts[title]["layer"]]
        ((low, high),) = {tuple(encoding["y"]["scale"]["domain"]) for encoding in encodings}
        return low, high


def make_run(
    folder: Path,
    *,
    steps: int = 12,
    finished: bool = True,
    speed: bool = True,
    gpu: bool = False,
    alpha: float = 0.9,
    teacher: float = 3.25,
    kl: tuple[str, ...] = ("kl_kept", "kl_bound"),
    **options: Any,
) -> Path:
    """A folder as train-student leaves it, of figures that a formula gives."""
    folder.mkdir(parents=True)
    config = {"student": "demo", "tokens": 100 * steps, "alpha": alpha, "out": str(folder)}
    dataset = {"spec": {"sequence_length": 16, "tokens_sha256": "ab" * 32}}
    (folder / "run.json").write_text(
        json.dumps({"config": config | options, "dataset": dataset, "evaluation_dataset": dataset})
    )
    with (folder / "metrics.jsonl").open("w") as metrics:
        for step in range(1, steps + 1):
            line = {
                "step": step, "kind": "train", "tokens": 100 * step, "loss": 4 + 6 / step,
                "lm": 5 + 6 / step, "kd": 3 + 6 / step if alpha else 0.0, "alpha": alpha,
                "learning_rate": 1e-3 / step, "gradient_norm": 1.0,
            }  # fmt: skip
            metrics.write(json.dumps(line) + "\n")
            if step % 4 == 0:
                line = {
                    "step": step, "kind": "validation", "tokens": 77,
                    "cross_entropy": 4 + 5 / step, "perplexity": math.exp(4 + 5 / step),
                    "teacher_cross_entropy": teacher, "top1_agreement": step / 100,
                    "bits_per_byte": 2 + 1 / step, "calibration_error": 0.1 / step,
                }  # fmt: skip
                line |= dict.fromkeys(kl, 1 + 5 / step)
                metrics.write(json.dumps(line) + "\n")
    if speed:
        used = {"flop_utilisation": 0.25, "peak_cuda_memory_bytes": 3 << 30} if gpu else {}
        lines = [
            {"step": step, "kind": "speed", "tokens": 100 * step, "seconds": 0.5,
             "tokens_per_s": 200.0, "data_wait": 0.1, "peak_memory_bytes": step << 28} | used
            for step in range(1, steps + 1)
        ]  # fmt: skip
        (folder / "speed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = {"steps": steps, "tokens": 100 * steps, "epochs": [1.5, 0.25],
                   "parameters": 7_357_824, "seconds": 99.0}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
