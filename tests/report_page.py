"""Folders of runs made from formulas, and a report's page taken apart again."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from student_train.report.charts import BOTTOM, LEFT, RIGHT, TOP

VOID = ("meta", "input", "wbr", "img")


class Page(HTMLParser):
    """Checks that every tag is closed where it must be, and collects what is drawn and written."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.charts: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[str]] = {}
        self.text = ""
        self._figure: dict[str, str | None] = {}
        self._row: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "figure":
            self._figure = found
        elif tag == "svg" and "aria-label" in found:
            title = str(found["aria-label"])
            self.charts[title] = {"axes": self._figure, "curves": {}, "bands": 0, "text": []}
        elif tag == "polyline":
            self._chart()["curves"][int(str(found["data-run"]))] = found["points"]
        elif tag == "polygon":
            self._chart()["bands"] += 1
        elif tag == "tr":
            self._row = []
        elif tag in ("td", "th"):
            self._row.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open  # HTML elements have no such end
        self.tags.append((tag, dict(attrs)))
        if tag in ("polyline", "polygon"):
            self.handle_starttag(tag, attrs)
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "tr" and self._row:
            self.rows.setdefault(self._row[0], self._row[1:])

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
            if "svg" in self.open and self.charts:
                self._chart()["text"].append(data)
            if "td" in self.open or "th" in self.open:
                self._row[-1] += data

    def values(self, title: str, run: int = 0) -> list[tuple[float, float]]:
        """(tokens, value) of a curve, from where it lies, as the page's script reads it."""
        chart = self.charts[title]
        end, low, high = (float(chart["axes"][f"data-{name}"]) for name in ("x", "low", "high"))
        points = [tuple(map(float, pair.split(","))) for pair in chart["curves"][run].split()]
        return [
            ((x - LEFT) / (RIGHT - LEFT) * end, low + (BOTTOM - y) / (BOTTOM - TOP) * (high - low))
            for x, y in points
        ]

    def _chart(self) -> dict[str, Any]:
        return self.charts[list(self.charts)[-1]]


def make_run(
    folder: Path,
    *,
    steps: int = 12,
    finished: bool = True,
    speed: bool = True,
    gpu: bool = False,
    alpha: float = 0.9,
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
                    "teacher_cross_entropy": 3.25, "top1_agreement": step / 100,
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
        summary = {"steps": steps, "tokens": 100 * steps, "epochs": 1.5, "parameters": 7_357_824,
                   "seconds": 99.0}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
