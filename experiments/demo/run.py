"""`make demo`: a real teacher writes shards, a small student is trained with and without them.

Everything lies under build/demo and is continued, not repeated, when the demo is run again. The
students differ in `--alpha` alone; the table compares them on documents that neither has seen.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import make_corpus
import make_teacher

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build"
DEMO = BUILD / "demo"
TEACHER, CORPUS, SHARDS = BUILD / "teacher", DEMO / "corpus.jsonl", DEMO / "shards"
MAX_TOKENS = 60_000
TRAIN_TOKENS = 120_000
BATCH_TOKENS = 4096
STUDENTS = {"distilled": 0.9, "labels only": 0.0}


def command(*words: object) -> None:
    """Run one of the project's commands and show it."""
    print("$ " + " ".join(map(str, words)), flush=True)
    subprocess.run([sys.executable, ROOT / "cli.py", *map(str, words)], check=True)


def dump() -> None:
    """The teacher pass: about a hundred sequences of 512 tokens."""
    command("dump-logits", "--teacher", TEACHER, "--corpus", CORPUS, "--out", SHARDS,
            "--sequence-length", 512, "--sequences-per-shard", 32, "--held-out", 0.1,
            "--max-tokens", MAX_TOKENS)  # fmt: skip


def train(name: str, alpha: float, seed: int) -> Path:
    """One student; returns its folder."""
    out = DEMO / f"{name.replace(' ', '-')}-{seed}"
    command("train-student", "--shards", SHARDS, "--student", "demo", "--out", out,
            "--alpha", alpha, "--tokens", TRAIN_TOKENS, "--batch-tokens", BATCH_TOKENS,
            "--micro-batch-sequences", 4, "--eval-every", 5, "--dtype", "float32",
            "--seed", seed)  # fmt: skip
    return out


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    """The metrics of a run of one kind, in order."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def table(runs: dict[str, list[Path]]) -> str:
    """Figures on held-out documents, mean and range over seeds."""
    figures = {
        "cross_entropy": "cross-entropy, nats",
        "kl_kept": "KL to the kept entries",
        "kl_bound": "KL to the teacher, lower bound",
        "top1_agreement": "top-1 agreement",
    }
    rows = [f"{'on held-out documents':<34}" + "".join(f"{name:>24}" for name in runs)]
    for key, title in figures.items():
        cells = []
        for folders in runs.values():
            values = [lines(folder, "validation")[-1][key] for folder in folders]
            spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.3f}{spread}")
        rows.append(f"{title:<34}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(rows)


def draw(runs: dict[str, list[Path]], out: Path) -> None:
    """Held-out cross-entropy and KL over training tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = {"cross_entropy": "held-out cross-entropy", "kl_bound": "held-out KL to the teacher"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for colour, (name, folders) in zip(("C0", "C1"), runs.items(), strict=True):
            for number, folder in enumerate(folders):
                points = lines(folder, "validation")
                tokens = [point["step"] * BATCH_TOKENS for point in points]
                label = name if number == 0 else None
                axis.plot(tokens, [point[key] for point in points], colour, label=label)
        axis.set(title=title, xlabel="training tokens", ylabel="nats per token")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


def main(num_seeds: int) -> None:
    """The whole demo with that many students of each kind."""
    started = time.monotonic()
    print("making the teacher folder (once) ...", flush=True)
    make_teacher.main(TEACHER)
    make_corpus.main(CORPUS)
    dump()
    command("inspect-shards", SHARDS)
    runs = {
        name: [train(name, alpha, seed) for seed in range(num_seeds)]
        for name, alpha in STUDENTS.items()
    }
    picture = DEMO / "curves.png"
    draw(runs, picture)
    command("train-student", "report", *(folder for folders in runs.values() for folder in folders),
            "--out", DEMO / "report.html")  # fmt: skip
    teacher = lines(runs["distilled"][0], "validation")[-1]["teacher_cross_entropy"]
    print(f"\n{table(runs)}\n\nthe teacher's own cross-entropy there: {teacher:.3f}")
    print(f"done in {time.monotonic() - started:.0f} s; a student this small, on text this short,")
    print("shows that the pipeline works, not what distillation gains at scale.\n")
    at = DEMO.relative_to(ROOT)
    print(f"shards    {at}/shards\nstudents  {at}/*/model")
    print(f"curves    {at}/curves.png, {at}/report.html")
    print(f"next:     .venv/bin/inspect-shards {at}/shards --row 0")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
