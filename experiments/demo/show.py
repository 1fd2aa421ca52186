"""What the demo prints of its shards and its students."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import logitshards
from shards.inspect import describe

CONTEXT = 64  # at least as many tokens stand before the line that is shown
LINE_TOKENS = range(8, 15)
PROSE = re.compile(r"[A-Za-z ,.'\"]+\n")
FIGURES = {
    "cross_entropy": ("cross-entropy, nats per token", "{:.3f}"),
    "perplexity": ("perplexity", "{:,.0f}"),
    "kl_unbiased": ("KL from the teacher, estimated, nats", "{:.3f}"),
    "top1_agreement": ("teacher's likeliest token, where stored", "{:.1%}"),
}


class Line:
    """A line of prose in a held-out sequence; its tokens are the labels of `positions`."""

    def __init__(self, dataset: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(dataset / "tokenizer" / "tokenizer.json"))
        split = logitshards.open(dataset)["validation"]
        border = split.spec.keep.exact_above
        assert border is not None, "the demo keeps what the default keeps"
        self.exact_above = math.exp(border)
        self.row, self.positions = self._find(split)

    def before(self) -> str:
        """The text of the line before it."""
        return self._text(self.row.tokens[: self.positions.start + 1]).splitlines()[-1]

    def labels(self) -> list[str]:
        """The tokens of the line, as texts."""
        return [self._word(self.row.tokens[t + 1]) for t in self.positions]

    def likeliest(self, distribution: np.ndarray, number: int) -> str:
        """The leading tokens of a distribution [V], each with its probability."""
        ids = np.argsort(-distribution, kind="stable")[:number]
        return "  ".join(f"{self._word(i)} {distribution[i]:.0%}" for i in ids)

    def stored(self, t: int, number: int) -> str:
        """The teacher's leading tokens: those whose probability the shard has, not a sample."""
        weights = self.row.dense(t)
        exact = np.where(weights > self.exact_above, weights, 0)
        number = min(number, int(np.count_nonzero(exact)))
        return self.likeliest(exact, number) or f"none above {self.exact_above:.0%}"

    def _find(self, rows: Sequence[logitshards.Row]) -> tuple[logitshards.Row, range]:
        for row in rows:
            ends = [t for t in range(CONTEXT, len(row)) if "\n" in self._text(row.tokens[[t]])]
            for start, stop in itertools.pairwise(ends):
                text = self._text(row.tokens[start + 1 : stop + 1])
                if stop - start in LINE_TOKENS and PROSE.fullmatch(text):
                    return row, range(start, stop)
        raise SystemExit("no line of prose of a length for the table")

    def _word(self, token: int) -> str:
        return repr(self._text([token]))  # in quotes, since most begin with a space

    def _text(self, tokens: Sequence[int] | np.ndarray) -> str:
        text: str = self._tokenizer.decode([int(i) for i in tokens], skip_special_tokens=False)
        return text


def stored(dataset: Path) -> str:
    """One line of text with the teacher's predictions, and the size of a token in the shards."""
    line, figures = Line(dataset), describe(dataset)
    row, vocab_size = line.row, figures["spec"]["tokenizer"]["vocab_size"]
    heads = ("next token", "teacher gave it", "its likeliest", "entries kept")
    cells = [
        (
            label,
            f"{np.exp(row.label_logprobs[t]):.1%}",
            line.stored(t, 3),
            f"{len(row.ids[t])}",
        )
        for label, t in zip(line.labels(), line.positions, strict=True)
    ]
    tokens, full = figures["tokens"], 2 * vocab_size
    size = figures["bytes"] / tokens
    return "\n".join([
        f"What the teacher predicted after: ... {line.before()}",
        "",
        *_table(heads, cells, right=(1, 3)),
        "",
        f"stored     {size:>6,.0f} bytes per token: {figures['entries'] / tokens:.0f} of"
        f" {vocab_size:,} entries, those below {line.exact_above:.0%} drawn by chance",
        f"all logits {full:>6,} bytes per token in bfloat16, {full / size:,.0f} times as much",
    ])  # fmt: skip


def compared(dataset: Path, runs: Mapping[str, Sequence[Path]]) -> str:
    """The students' figures on held-out documents, and what each predicts in the same line.

    Figures of several runs are means, with the smallest and the largest behind.
    """
    figures = {name: [_last_validation(run) for run in folders] for name, folders in runs.items()}
    rows = [
        (title, *(_mean([last[key] for last in found], form) for found in figures.values()))
        for key, (title, form) in FIGURES.items()
    ]
    own = next(iter(figures.values()))[0]["teacher_cross_entropy"]
    teacher = (f"{own:.3f}", f"{np.exp(own):,.0f}", "0", "100%")
    rows = [(*row, value) for row, value in zip(rows, teacher, strict=True)]
    line = Line(dataset)
    tokens = line.row.tokens[: line.positions.stop]
    guesses = [line.labels(), [line.stored(t, 1) for t in line.positions]]
    for folders in runs.values():
        distributions = _next_tokens(folders[0] / "model", tokens)
        guesses.append([line.likeliest(distributions[t], 1) for t in line.positions])
    return "\n".join([
        *_table(("on held-out documents", *runs, "teacher"), rows, right=(1, 2, 3)),
        "",
        f"What each predicts after: ... {line.before()}",
        "",
        *_table(("next token", "teacher", *runs), list(zip(*guesses, strict=True))),
    ])  # fmt: skip


def _last_validation(run: Path) -> dict[str, Any]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last: dict[str, Any] = [x for x in map(json.loads, lines) if x["kind"] == "validation"][-1]
    return last


def _mean(values: Sequence[float], form: str) -> str:
    spread = f" ({form.format(min(values))} to {form.format(max(values))})"
    return form.format(sum(values) / len(values)) + (spread if len(values) > 1 else "")


def _next_tokens(model: Path, tokens: np.ndarray) -> np.ndarray:
    """The distributions [n, V] of an exported student after each of n tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = student(torch.tensor(np.array(tokens))[None]).logits[0]
    distributions: np.ndarray = logits.softmax(-1).numpy()
    return distributions


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()
) -> list[str]:
    """Aligned lines, the columns in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "   ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [heads, *rows]
    ]
