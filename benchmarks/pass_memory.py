"""Peak memory of `dump-logits` over corpora and batches of growing size, whole command.

What is counted is memory of the process that no file is behind (RssAnon): weights, the key-value
cache (`VLLM_CPU_KVCACHE_SPACE`), batches, logits, rows that wait to be written. It should grow
neither with the corpus nor, by more than the hidden states, with the tokens of a batch: the logits
of a batch of 8,192 tokens would be 1.5 GiB at V = 49,152. Needs the teacher and the corpus that
`make demo` makes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.teacher_inputs import part_of

_POLL_S = 0.1


def anonymous_mib(pid: int) -> float:
    """RssAnon of a process; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def peak_of_pass(teacher: Path, corpus: Path, tokens: int, batch_tokens: int) -> dict[str, float]:
    """Peak in MiB, and tokens/s as the command prints it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, ROOT / "cli.py", "dump-logits", "--teacher", teacher,
            "--corpus", corpus, "--out", Path(folder) / "out", "--sequence-length", 512,
            "--max-tokens", tokens, "--engine-arg", f"max_num_batched_tokens={batch_tokens}",
        ]  # fmt: skip
        log = Path(folder) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output)
            peak = 0.0
            while process.poll() is None:
                peak = max(peak, anonymous_mib(process.pid))
                time.sleep(_POLL_S)
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
        if process.returncode:
            raise click.ClickException(last)
    return {
        "tokens": tokens,
        "batch_tokens": batch_tokens,
        "peak_mib": peak,
        "tokens_per_s": float(last.split()[-2].replace(",", "")),
    }


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), default=ROOT / "build" / "teacher")
@click.option(
    "--corpus", type=click.Path(path_type=Path), default=ROOT / "build" / "demo" / "corpus.jsonl"
)
@click.option("--layers", default=2, show_default=True, help="Of the teacher, for speed.")
@click.option("--tokens", default="40000,80000,160000,320000", show_default=True)
@click.option("--batch-tokens", default="2048,8192", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
def main(
    teacher: Path, corpus: Path, layers: int, tokens: str, batch_tokens: str, json_file: Path | None
) -> None:
    """Every number of tokens at the first size of a batch, and the first of them at the others."""
    teacher = part_of(teacher, layers, 1)
    sizes, batches = ([int(part) for part in text.split(",")] for text in (tokens, batch_tokens))
    cases = [(size, batches[0]) for size in sizes] + [(sizes[0], batch) for batch in batches[1:]]
    figures = []
    click.echo(f"{'tokens':>10}{'batch':>8}{'peak MiB':>10}{'tokens/s':>10}")
    for size, batch in cases:
        row = peak_of_pass(teacher, corpus, size, batch)
        figures.append(row)
        click.echo(f"{size:>10,}{batch:>8,}{row['peak_mib']:>10,.0f}{row['tokens_per_s']:>10,.0f}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
