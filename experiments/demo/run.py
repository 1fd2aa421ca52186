"""`make demo`: a real teacher writes shards, a small student is trained with and without them.

Everything lies under build/demo and is continued, not repeated, when the demo is run again. The
students differ in `--alpha` alone; the tables compare them on documents that neither has seen.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TQDM_DISABLE"] = "1"  # bars of libraries; read when tqdm is imported

import make_corpus
import make_teacher
import show

BUILD = Path("build")  # below ROOT, where the demo works
DEMO = BUILD / "demo"
TEACHER, CORPUS, SHARDS = BUILD / "teacher", DEMO / "corpus.jsonl", DEMO / "shards"
REPORT = DEMO / "report.html"
MAX_TOKENS = 60_000
TRAIN_TOKENS = 120_000
STUDENTS = {"distilled": 0.9, "labels only": 0.0}


def command(*words: object, show_summary: bool = True) -> None:
    """Show one of the project's commands and run it."""
    texts = list(map(str, words))
    lines = textwrap.wrap(shlex.join(texts), 96, subsequent_indent="    ", break_on_hyphens=False)
    print("\n$ " + " \\\n".join(lines), flush=True)
    summary = None if show_summary else subprocess.DEVNULL
    subprocess.run([sys.executable, "cli.py", *texts], check=True, stdout=summary)


def dump() -> None:
    """The teacher pass: about a hundred sequences of 512 tokens."""
    command("dump-logits", "--teacher", TEACHER, "--corpus", CORPUS, "--out", SHARDS,
            "--sequence-length", 512, "--sequences-per-shard", 32, "--held-out", 0.1,
            "--max-tokens", MAX_TOKENS, "--eos-token", "<|endoftext|>")  # fmt: skip


def train(name: str, alpha: float, seed: int) -> Path:
    """One student; returns its folder. Its figures come later, beside those of the other."""
    out = DEMO / f"{name.replace(' ', '-')}-{seed}"
    command("train-student", "--shards", SHARDS, "--student", "demo", "--out", out,
            "--alpha", alpha, "--tokens", TRAIN_TOKENS, "--batch-tokens", 1024,
            "--eval-every", 30, "--dtype", "float32", "--seed", seed,
            show_summary=False)  # fmt: skip
    return out


def main(num_seeds: int) -> None:
    """The whole demo with that many students of each kind."""
    started = time.monotonic()
    os.chdir(ROOT)
    print("making the teacher's folder and the corpus ...", flush=True)
    make_teacher.main(TEACHER)
    make_corpus.main(CORPUS)
    dump()
    print(f"\n{show.stored(SHARDS)}", flush=True)
    runs = {
        name: [train(name, alpha, seed) for seed in range(num_seeds)]
        for name, alpha in STUDENTS.items()
    }
    command("train-student", "report", *(folder for folders in runs.values() for folder in folders),
            "--out", REPORT)  # fmt: skip
    print(f"\n{show.compared(SHARDS, runs)}\n")
    print(f"Done in {time.monotonic() - started:.0f} s. A student this small, on text this short,")
    print("shows that the pipeline works, not what distillation gains at scale.\n")
    print(f"shards    {SHARDS}\nstudents  {DEMO}/*/model\nreport    {REPORT}, open it in a browser")
    print(f"next      .venv/bin/inspect-shards {SHARDS} --row 0")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
