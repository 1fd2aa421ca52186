"""One command for the grid: `run.py --work FOLDER` runs what the results do not have yet.

It prepares text, tokenizer, teacher and datasets when the first cell needs them, trains the cells
in the order of `grid.runs`, and appends one row per run to the results. Everything is in the work
folder, which can grow to 30 GB. Stop it with a signal whenever you like: the same command goes on
from there, because each command that it runs does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from experiments.design_space import results, text
from experiments.design_space.commands import Commands, Failed
from experiments.design_space.grid import BASE_TEACHER, SAMPLED, Cell, runs
from experiments.design_space.scales import (
    FULL,
    LATE,
    LM,
    OFFLINE,
    SCALES,
    TARGETS,
    WITHOUT_TEACHER,
    Model,
    Options,
    digest,
)

RESULTS = Path(__file__).parent / "results.csv"
FIGURES = {
    "cross_entropy": "cross_entropy",
    "kl": "kl_bound",  # exact: the evaluation dataset keeps everything
    "top1_agreement": "top1_agreement",
    "calibration_error": "calibration_error",
    "teacher_cross_entropy": "teacher_cross_entropy",
}


class Grid:
    """The steps of a grid in its work folder. Each is done once; names end in a settings hash."""

    def __init__(self, work: Path, scale: str, commands: Commands, jobs: int) -> None:
        self._work, self._scale_name, self._scale = work, scale, SCALES[scale]
        self._command, self._preparing = commands.run, threading.Lock()
        self._threads = max(1, (os.cpu_count() or 1) // jobs)  # of a student's run
        work.mkdir(parents=True, exist_ok=True)
        packages = self._scale.packages
        name = digest([list(packages), self._scale.held_out])
        self._corpus = text.write_corpus(work / f"corpus-{name}", packages, self._scale.held_out)
        self.text = self._corpus.sha256[:12]
        vocabulary = self._scale.vocab_size
        self._tokenizer = work / f"tokenizer-{vocabulary}-{self.text}"
        text.write_tokenizer(self._tokenizer, self._corpus.train, vocabulary)

    def prepare(self, cell: Cell) -> tuple[Path, Path]:
        """The datasets that a cell trains and is evaluated on. Failed if a command fails."""
        with self._preparing:
            return self._dataset(cell), self._evaluation()

    def run(self, cell: Cell, seed: int, shards: Path, evaluation: Path) -> dict[str, object]:
        """Train and evaluate a cell; returns its row. Failed if the run does."""
        scale = self._scale
        settings = cell.hash(scale)
        out = self._work / "runs" / f"{settings}-{self.text}-{seed}"
        options = cell.train_options(scale)
        run: Options = {"seed": seed, "eval-shards": str(evaluation)}
        run |= {"teacher": str(self._teacher(cell.teacher))} if cell.target == FULL else {}
        self._train(out, scale.students[cell.student], shards, run | options, threads=self._threads)
        figures, size = _last_validation(out), _description(shards)
        if cell.target == FULL:  # as stored in bfloat16, which nobody does
            vocabulary = scale.vocab_size
            size |= {"bytes_per_token": 2 * vocabulary, "entries_per_token": vocabulary}
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        return {
            "settings": settings,
            "text": self.text,
            "question": cell.question,
            "cell": cell.name,
            "seed": seed,
            **{column: f"{figures[key]:.6g}" for column, key in FIGURES.items()},
            **{key: f"{size[key]:.6g}" for key in ("bytes_per_token", "entries_per_token")},
            **{key: summary[key] for key in ("parameters", "tokens")},
            "seconds": f"{summary['seconds']:.1f}",
            "logits": cell.logits,
            "dump": json.dumps(scale.dump_options(cell.target, cell.data)),
            "train": json.dumps(options),
            "scale": self._scale_name,
            "commit": _commit(),
            "machine": _machine(),
        }

    def _dataset(self, cell: Cell) -> Path:
        """The shards of a cell's target, by its teacher."""
        if cell.logits != OFFLINE:
            self._pretrain(cell.teacher, cell.logits)
            return self._described(self._own_logits(cell.logits))
        scale, options = self._scale, self._scale.dump_options(cell.target, cell.data)
        tokens_alone = cell.target in WITHOUT_TEACHER
        made_of = None if tokens_alone else scale.teacher_settings(cell.teacher)
        name = digest([self.text, scale.vocab_size, scale.layout, made_of, options])
        label = LM if tokens_alone else cell.target
        out = self._work / "datasets" / f"{label.replace(' ', '-')}-{name}"
        if not _description_file(out).exists():
            if tokens_alone:
                options |= {"tokenizer": str(self._tokenizer)}
            else:
                options |= {"teacher": str(self._teacher(cell.teacher))}
            self._dump(out, self._corpus.train, options | {"held-out": 0})
        return self._described(out)

    def _described(self, dataset: Path) -> Path:
        """The dataset, with what inspect-shards says of it in a file beside it."""
        described = _description_file(dataset)
        if not described.exists():
            unfinished = described.with_suffix(".part")
            self._command("inspect-shards", dataset, "--json", output=unfinished)
            unfinished.replace(described)
        return dataset

    def _own_logits(self, logits: str) -> Path:
        """Where the base teacher saves its logits in its training."""
        made_of = [self.text, self._scale.teacher_settings(BASE_TEACHER, logits), TARGETS[SAMPLED]]
        return self._work / "datasets" / f"online-{logits}-{digest(made_of)}"

    def _evaluation(self) -> Path:
        """Full distributions on held-out documents, for all cells.

        dump-logits needs a document outside the validation split, so a tenth is left unused.
        """
        scale = self._scale
        options = scale.evaluation_options
        name = digest([self.text, scale.vocab_size, scale.teacher_settings(BASE_TEACHER), options])
        out = self._work / "datasets" / f"evaluation-{name}"
        if not (done := _description_file(out)).exists():
            options |= {"teacher": str(self._teacher(BASE_TEACHER))}
            self._dump(out, self._corpus.held_out, options)
            done.touch()
        return out

    def _teacher(self, name: str) -> Path:
        """The folder of a teacher that the trainer pre-trained on the text."""
        return self._pretrain(name, LATE if name == BASE_TEACHER else OFFLINE)

    def _pretrain(self, name: str, logits: str) -> Path:
        """The folder of a teacher, which saves the logits that `logits` names in its training."""
        scale = self._scale
        settings = scale.teacher_settings(name, logits)
        out = self._work / f"teacher-{name}-{digest([self.text, settings])}"
        if not (out / "model").exists():
            made_of = [self.text, scale.vocab_size, scale.layout]
            tokens = self._work / "datasets" / f"tokens-{digest(made_of)}"
            options: Options = {"keep": "tokens", "held-out": 0, "tokenizer": str(self._tokenizer)}
            self._dump(tokens, self._corpus.train, options)
            options = scale.teacher_options(logits)
            if logits != OFFLINE:
                shards = {"sequences-per-shard": scale.sequences_per_shard}
                own: Options = {"save-logits": str(self._own_logits(logits))}
                options |= own | shards | TARGETS[SAMPLED]
            self._train(out, scale.teachers[name], tokens, options)
        return out / "model"

    def _dump(self, out: Path, corpus: Path, options: Options) -> None:
        words = _words(self._scale.layout | options)
        self._command("dump-logits", "--corpus", corpus, "--out", out, *words)

    def _train(
        self, out: Path, model: Model, shards: Path, options: Options, threads: int | None = None
    ) -> None:
        """Train a model; a run that is finished is only opened."""
        scale = self._scale
        config = model.config_json(scale.vocab_size, 2 * scale.sequence_length)
        file = self._work / "configs" / f"{digest(config)}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(config), encoding="utf-8")
        words = _words(options | {"learning-rate": model.learning_rate})
        words = ["--shards", str(shards), "--student", str(file), "--out", str(out), *words]
        self._command("train-student", *words, threads=threads)


def _words(options: Options) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def _description_file(dataset: Path) -> Path:
    return dataset.with_name(dataset.name + ".json")


def _description(dataset: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_description_file(dataset).read_text(encoding="utf-8"))
    return content


def _last_validation(run: Path) -> dict[str, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    last: dict[str, float] = [line for line in lines if line["kind"] == "validation"][-1]
    return last


def _commit() -> str:
    """The commit of the code, with a plus if files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    code = ["logitshards", "shards", "student_train", "teacher_dump", "cli.py"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], capture_output=True)
    return (head.stdout.strip() or "unknown") + ("+" if changed.returncode == 1 else "")


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"


def main() -> None:
    """Run the missing cells. Ends with 1 if one failed; the others are done then."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything large")
    parser.add_argument("--scale", choices=SCALES, default="laptop")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file to append to")
    parser.add_argument("--questions", type=int, nargs="*", default=[], help="default: all")
    parser.add_argument("--runs", type=int, help="end after this many")
    parser.add_argument("--jobs", type=int, default=1, help="students to train at once")
    parser.add_argument("--minutes", type=float, help="end after this time")
    options = parser.parse_args()
    commands = Commands(options.minutes)
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "pid").write_text(f"{os.getpid()}\n", encoding="utf-8")
    grid = Grid(options.work.resolve(), options.scale, commands, options.jobs)
    there = {_key(row) for row in results.read(options.results)}
    scale = SCALES[options.scale]
    missing = [
        (cell, seed)
        for cell, seed in runs(options.questions)
        if (cell.hash(scale), grid.text, str(seed)) not in there
    ][: options.runs]
    appending = threading.Lock()

    def run(cell: Cell, seed: int) -> str | None:
        """Run a cell and append its row; returns its name if it failed. Failed without its data."""
        name = f"{cell.name}, seed {seed}"
        shards, evaluation = grid.prepare(cell)
        try:
            row = grid.run(cell, seed, shards, evaluation)
        except Failed as error:  # such as a run that diverged; the others are worth their time
            print(f"{name}: {error}", flush=True)
            return name
        with appending:
            results.append(options.results, row)
        print(f"{name}: cross-entropy {row['cross_entropy']}", flush=True)
        return None

    pool = ThreadPoolExecutor(options.jobs)
    try:
        failed, waiting = [], {pool.submit(run, cell, seed) for cell, seed in missing}
        while waiting:
            # Another thread may get a signal; this one sees it at the end of its wait.
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            failed += [name for job in done if (name := job.result()) is not None]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        commands.stop()
    if failed:
        raise Failed(f"{len(failed)} runs failed: {'; '.join(failed)}")


def _key(row: Mapping[str, str]) -> tuple[str, str, str]:
    return row["settings"], row["text"], row["seed"]


if __name__ == "__main__":
    main()
