"""Draws docs/results.md from the rows of the results: `draw.py`.

It replaces what stands between `<!-- question N -->` and `<!-- end -->`, and writes the plots. It
shows a figure as mean and standard deviation over seeds, and that of one seed without a deviation.
Gains are differences of runs with the same seed, which share initial weights and the order of
sequences. All rows of a table are of the same seeds, those that each of its cells has.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from experiments.design_space import grid, results
from experiments.design_space.grid import Cell
from experiments.design_space.scales import FULL, LM, SCALES, Scale

PAGE = ROOT / "docs" / "results.md"
RESULTS = Path(__file__).parent / "results.csv"
FIGURES = {
    "cross_entropy": ("cross-entropy", ".3f"),
    "kl": ("KL to the teacher", ".3f"),
    "top1_agreement": ("agreement", ".3f"),
    "calibration_error": ("calibration error", ".4f"),
}
_SECTION = re.compile(r"(<!-- question (\d) -->\n).*?(<!-- end -->)", re.DOTALL)


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; one seed has no deviation."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None without values."""
        values = list(values)
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.mean(values), deviation)

    def text(self, form: str) -> str:
        """As in a table."""
        deviation = "" if self.deviation is None else f" ± {self.deviation:{form}}"
        return f"{self.mean:{form}}{deviation}"


class Rows:
    """The rows of one text, by cell and seed. None: the text of the last row."""

    def __init__(self, rows: Sequence[results.Row], scale: Scale, text: str | None = None) -> None:
        self._scale = scale
        text = text or (rows[-1]["text"] if rows else None)
        self._rows: dict[str, dict[str, results.Row]] = defaultdict(dict)
        for row in rows:
            if row["text"] == text:
                self._rows[row["settings"]][row["seed"]] = row

    def of_seeds(self, seeds: Collection[str]) -> Rows:
        """The rows with these seeds."""
        kept = Rows((), self._scale)
        for settings, rows in self._rows.items():
            kept._rows[settings] = {seed: row for seed, row in rows.items() if seed in seeds}
        return kept

    def of(self, cell: Cell) -> Mapping[str, results.Row]:
        """The rows of a cell by seed."""
        return self._rows.get(cell.hash(self._scale), {})

    def figure(self, cell: Cell, key: str) -> Spread | None:
        """A column of a cell's rows."""
        return Spread.of(float(row[key]) for row in self.of(cell).values())

    def gain(self, cell: Cell) -> Spread | None:
        """How far a cell's cross-entropy is below that of the labels alone, nats."""
        pairs = self._pairs(cell, grid.labels_alone(cell))
        return Spread.of(there - here for here, there in pairs)

    def share(self, cell: Cell) -> Spread | None:
        """The gain as a part of that of the full distributions."""
        plain, full = grid.labels_alone(cell), Cell(question=1, target=FULL)
        entropies = [self._entropies(each) for each in (cell, plain, full)]
        seeds = set.intersection(*map(set, entropies))
        own, low, high = ([each[seed] for seed in sorted(seeds)] for each in entropies)
        return Spread.of((b - a) / (b - c) for a, b, c in zip(own, low, high, strict=True))

    def _pairs(self, *pair: Cell) -> list[tuple[float, float]]:
        here, there = map(self._entropies, pair)
        return [(here[seed], there[seed]) for seed in sorted(here.keys() & there.keys())]

    def _entropies(self, cell: Cell) -> dict[str, float]:
        return {seed: float(row["cross_entropy"]) for seed, row in self.of(cell).items()}


def section(rows: Rows, question: int) -> str:
    """The content of a question's section: a table, and the plot if there is one to see."""
    cells = [cell for cell in grid.shown(question) if rows.of(cell)]
    missing = [cell.name for cell in grid.shown(question) if cell not in cells]
    rows = _comparable(rows, question)
    parts = []
    points = _points(rows, question)
    if len(points) > 1:
        parts.append(f"![Question {question}](images/results-{question}.svg)")
    if question == 1 and (harm := [point["cell"] for point in points if point["value"] < 0]):
        parts.append(f"Below zero, so not in the plot: {'; '.join(harm)}.")
    if cells:
        parts.append(table(rows, cells, shares=question == 1))
    if missing:
        parts.append(f"Not run yet: {'; '.join(missing)}.")
    return "".join(f"\n{part}\n" for part in parts) + "\n"


def _comparable(rows: Rows, question: int) -> Rows:
    """The rows of the seeds that all cells of a question have."""
    found = [set(rows.of(cell)) for cell in grid.shown(question) if rows.of(cell)]
    return rows.of_seeds(set.intersection(*found) if found else ())


def table(rows: Rows, cells: Sequence[Cell], shares: bool) -> str:
    """Markdown with a line for each cell."""
    heads = ["", "entries/token", "bytes/token", *(title for title, _ in FIGURES.values())]
    heads += ["gain, nats", *(["share"] if shares else []), "seeds"]
    lines = [heads, ["---"] * len(heads)]
    for cell in cells:
        sizes, gains = ["-", "-"], ["-"] * (1 + shares)
        if cell.target != LM:
            row = next(iter(rows.of(cell).values()))
            sizes = [f"{float(row[key]):.1f}" for key in ("entries_per_token", "bytes_per_token")]
            gains = [_text(rows.gain(cell), ".3f")]
            gains += [_text(rows.share(cell), ".0%")] if shares else []
        figures = [
            _text(None if _unknown(cell, key) else rows.figure(cell, key), form)
            for key, (_, form) in FIGURES.items()
        ]
        lines.append([cell.name, *sizes, *figures, *gains, str(len(rows.of(cell)))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _unknown(cell: Cell, key: str) -> bool:
    """Whether a column compares with the base teacher, which is not the cell's."""
    return key in ("kl", "top1_agreement") and cell.teacher != grid.BASE_TEACHER


def _text(spread: Spread | None, form: str) -> str:
    return "-" if spread is None else spread.text(form)


def plot(rows: Rows, question: int) -> Any:
    """The chart of a question, or None for fewer than two cells."""
    points = _points(_comparable(rows, question), question)
    if len(points) < 2:
        return None
    return _size_chart(points) if question == 1 else _gain_chart(points)


def _points(rows: Rows, question: int) -> list[dict[str, Any]]:
    value = rows.share if question == 1 else rows.gain
    ends = (LM, FULL) if question == 1 else (LM,)
    cells = [cell for cell in grid.shown(question) if cell.target not in ends]
    return [_point(cell, found, rows) for cell in cells if (found := value(cell)) is not None]


def _point(cell: Cell, value: Spread, rows: Rows) -> dict[str, Any]:
    row, deviation = next(iter(rows.of(cell).values())), value.deviation or 0.0
    return {
        "cell": cell.name,
        "method": json.loads(row["dump"])["keep"],
        "bytes": float(row["bytes_per_token"]),
        "value": value.mean,
        "low": value.mean - deviation,
        "high": value.mean + deviation,
    }


def _size_chart(points: Sequence[Mapping[str, Any]]) -> Any:
    """The share of the full distributions' gain over bytes per token."""
    import altair as alt

    shown = [point for point in points if point["value"] >= 0]
    base = alt.Chart(alt.InlineData(values=shown)).encode(
        alt.X("bytes:Q", title="bytes per token").scale(type="log", nice=False, padding=80),
        alt.Y("value:Q", title="share of the gain of full distributions").axis(format="%"),
        alt.Color("method:N", title="--keep"),
    )
    line = (
        alt.Chart(alt.InlineData(values=[{"value": 1}]))
        .mark_rule(color="gray", strokeDash=[3, 3])
        .encode(alt.Y("value:Q"))
    )

    def names(which: Any, **place: Any) -> Any:
        return (
            base.transform_filter(which).mark_text(fontSize=10, **place).encode(alt.Text("cell:N"))
        )

    return alt.layer(
        line,
        base.mark_rule().encode(alt.Y("low:Q"), alt.Y2("high")),
        base.mark_circle(size=60, opacity=1),
        # Samples of the two kinds lie close to each other.
        names(alt.datum.method != "draws", align="right", dx=-7, dy=-5),
        names(alt.datum.method == "draws", align="left", dx=7, dy=7),
    ).properties(width=620, height=380)


def _gain_chart(points: Sequence[Mapping[str, Any]]) -> Any:
    """The gain over the labels alone, cell by cell."""
    import altair as alt

    order = [point["cell"] for point in points]
    base = alt.Chart(alt.InlineData(values=list(points))).encode(
        alt.Y("cell:N", title=None).sort(order).axis(labelLimit=400),
        alt.X("value:Q", title="cross-entropy below that of the labels alone, nats"),
    )
    return alt.layer(
        base.mark_rule().encode(alt.X("low:Q"), alt.X2("high")),
        base.mark_circle(size=60, opacity=1),
    ).properties(width=420)


def draw(page: str, rows: Rows) -> str:
    """The page with the sections of the rows."""
    return _SECTION.sub(lambda m: m[1] + section(rows, int(m[2])) + m[3], page)


def main() -> None:
    """Rewrite the page and its plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--scale", choices=SCALES, default="laptop")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    scale = [row for row in results.read(options.results) if row["scale"] == options.scale]
    rows = Rows(scale, SCALES[options.scale])
    page = options.page.read_text(encoding="utf-8")
    options.page.write_text(draw(page, rows), encoding="utf-8")
    images = options.page.parent / "images"
    images.mkdir(exist_ok=True)
    for question in grid.QUESTIONS:
        chart = plot(rows, question)
        if chart is not None:
            chart.save(images / f"results-{question}.svg")


if __name__ == "__main__":
    main()
