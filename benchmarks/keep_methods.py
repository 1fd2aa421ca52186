"""What each keep method costs on disk, and how far its targets are from the teacher's.

A teacher reads a text. At every position each method selects from the same logits, as the teacher
pass does, and writes its rows to a real shard. The table has

bytes      of the columns `ids` and `logprobs` in that shard, per token
error      mean of |w - p|^2, p the teacher's full distribution and w the target that the trainer
           makes of what was stored: the squared error of the gradient of the student's logits
KL         mean of KL(w / sum(w) || p): how far the target of one position is from the teacher

An unbiased method's error averages out over positions; a biased one's stays.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.example_spec import example_spec
from benchmarks.teacher_inputs import engine_options, read_sequences
from shards.keep import Draws, Keep, Threshold, TopPK
from shards.layout import Layout
from shards.reader import ShardReader
from shards.rows import Row
from shards.schema import ENTRY_COLUMNS
from shards.spec import TRAIN
from shards.writer import ShardWriter
from teacher_dump.engines.transformers_engine import TransformersEngine
from teacher_dump.keep.packed import Selected, unpack
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.random_keys import position_keys, sequence_key
from teacher_dump.keep.rows import make_row
from teacher_dump.keep.selection import select_in_blocks, selector_of
from teacher_dump.tokenizer import load_tokenizer

METHODS: tuple[tuple[str, Keep], ...] = (
    *((f"top-p-k 0.95 {k}", TopPK(top_p=0.95, top_k=k)) for k in (12, 25, 50, 100, 200)),
    *((f"draws {n}", Draws(draws=n)) for n in (12, 25, 50, 100, 200)),
    *((f"threshold {t}", Threshold(threshold=t)) for t in (0.2, 0.1, 0.05, 0.03, 0.01)),
)


class _Method:
    """One method: its open shard and its sums."""

    def __init__(self, name: str, keep: Keep, vocab_size: int, folder: Path, rows: int) -> None:
        self.keep, self.name, self.kind = keep, name, keep.method
        self._selection = Selection(keep, vocab_size)
        self._select = selector_of(self._selection)
        self._layout = Layout(sequences_per_shard=rows, sequences_per_row_group=rows)
        self._folder = folder
        self._rows: list[Row] = []
        self._error = self._divergence = 0.0
        self._entries = self._tokens = 0

    def add(self, sequence: Any, logits: torch.Tensor, probs: np.ndarray) -> None:
        labels = torch.from_numpy(sequence.tokens[1:]).long()
        keys = torch.from_numpy(
            position_keys(sequence_key(0, "train", sequence.number), 0, len(labels))
        )
        packed = select_in_blocks(self._select, logits, labels, keys)
        selected = unpack(packed.numpy(), self._selection)
        self._rows.append(make_row(sequence, selected, self.keep.logprob_step))
        self._measure(selected, probs)

    def _measure(self, selected: Selected, probs: np.ndarray) -> None:
        borders = np.concatenate([[0], np.cumsum(selected.counts)])
        for row, (start, stop) in zip(probs, itertools.pairwise(borders), strict=True):
            ids = selected.ids[start:stop]
            weights = np.exp(selected.logprobs[start:stop].astype(np.float64))
            normalised = weights / weights.sum()
            target = normalised if self.keep.has_tail else weights
            p = row[ids].astype(np.float64)
            squares = np.dot(row, row) - np.dot(p, p)
            self._error += float(squares + ((target - p) ** 2).sum())
            self._divergence += float((normalised * np.log(normalised / p)).sum())
        self._entries += len(selected.ids)
        self._tokens += len(probs)

    def figures(self) -> dict[str, Any]:
        spec = example_spec(
            keep=self.keep, layout=self._layout, vocab_size=self._selection.vocab_size
        )
        with ShardWriter(self._folder / TRAIN, shard=0, split=TRAIN, spec=spec) as writer:
            writer.write_rows(self._rows)
            writer.publish()
            path = writer.path
        with ShardReader(path) as reader:
            columns = reader.column_bytes()
        return {
            "method": self.kind,
            "options": self.name,
            "entries_per_token": self._entries / self._tokens,
            "bytes_per_token": sum(columns[name] for name in ENTRY_COLUMNS) / self._tokens,
            "gradient_error": self._error / self._tokens,
            "kl": self._divergence / self._tokens,
        }


def measure(teacher: Path, corpus: Path, num_sequences: int, length: int) -> list[dict[str, Any]]:
    """Figures of every method over the same positions."""
    vocab_size = load_tokenizer(teacher).vocab_size
    engine = TransformersEngine(engine_options(teacher, length, Selection(TopPK(), vocab_size)))
    sequences = read_sequences(corpus, teacher, num_sequences, length)
    with tempfile.TemporaryDirectory() as folder:
        methods = [
            _Method(name, keep, vocab_size, Path(folder) / str(number), num_sequences)
            for number, (name, keep) in enumerate(METHODS)
        ]
        for sequence in sequences:
            logits = torch.cat(list(engine.logits(sequence.tokens[:-1]))).cpu()
            probs = torch.softmax(logits[:, :vocab_size], -1).numpy()
            for method in methods:
                method.add(sequence, logits, probs)
            click.echo(f"sequence {sequence.number + 1} of {num_sequences}", err=True)
        return [method.figures() for method in methods]


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Bytes per token against the error, one line for each method."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "keep-methods"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    markers = {
        "top-p-k": ("s", "biased"),
        "draws": ("o", "unbiased"),
        "threshold": ("D", "unbiased"),
    }
    for kind, (marker, bias) in markers.items():
        points = [point for point in figures if point["method"] == kind]
        axes.plot(
            [point["bytes_per_token"] for point in points],
            [point["gradient_error"] for point in points],
            marker=marker,
            label=f"{kind} ({bias})",
        )
        for point in points:
            axes.annotate(
                point["options"].split()[-1],
                (point["bytes_per_token"], point["gradient_error"]),
                textcoords="offset points",
                xytext=(6, 4),
                fontsize=8,
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bytes of ids and logprobs per token",
        ylabel="mean of |w - p|^2",
    )
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), default=ROOT / "build" / "teacher")
@click.option(
    "--corpus", type=click.Path(path_type=Path), default=ROOT / "build" / "demo" / "corpus.jsonl"
)
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--sequences", default=64, show_default=True)
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Write an SVG.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
def main(
    teacher: Path,
    corpus: Path,
    sequence_length: int,
    sequences: int,
    picture: Path | None,
    json_file: Path | None,
) -> None:
    """Bytes per token against fidelity (`make demo` makes the inputs)."""
    figures = measure(teacher, corpus, sequences, sequence_length)
    click.echo(f"{sequences} sequences of {sequence_length}")
    click.echo("| `--keep` | entries/token | bytes/token | mean of abs(w - p)^2 | KL |")
    click.echo("|---|---|---|---|---|")
    for point in figures:
        click.echo(
            f"| {point['options']} | {point['entries_per_token']:.1f} "
            f"| {point['bytes_per_token']:.1f} | {point['gradient_error']:.4f} "
            f"| {point['kl']:.3f} |"
        )
    if picture is not None:
        plot(figures, picture)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
