"""What Ray costs: start-up, each shard, and two workers beside one.

The same corpus is dumped alone, by one Ray worker and by two, each time by a fresh process into a
fresh folder, in turn. With `--teacher` vLLM runs it; without, tokens alone are written, so that
what is left of a shard is Ray's cost and the disk's.

  start      seconds of the command before the first engine is ready, and after the last shard
  tokens/s   from then to the last shard
  per shard  milliseconds of that time for each shard
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from shards.keep import Tokens, TopPK
from teacher_dump.config import DumpConfig
from teacher_dump.processes.ranks import ClusterOptions
from tests.forked import FORKED
from tests.tiny_teacher import make_tokenizer, write_corpus

VARIANTS = {"alone": None, "1 worker": 1, "2 workers": 2}


def dump(config: DumpConfig, workers: int | None, record: Path) -> None:
    """One dump, in a fresh process."""
    from teacher_dump.dump import run

    started = time.perf_counter()
    summary = run(config, ClusterOptions(workers=workers))
    wall = time.perf_counter() - started
    record.write_text(json.dumps([wall - summary.seconds, summary.tokens_per_s,
                                  1000 * summary.seconds / summary.shards]))  # fmt: skip


@click.command()
@click.option("--teacher", help="A model folder; without it tokens alone are written.")
@click.option("--corpus", type=click.Path(path_type=Path), help="Needed with --teacher.")
@click.option("--max-tokens", default=60_000, show_default=True)
@click.option("--sequence-length", default=64, show_default=True)
@click.option("--sequences-per-shard", default=4, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
def main(
    teacher: str | None, corpus: Path | None, max_tokens: int, sequence_length: int,
    sequences_per_shard: int, rounds: int, json_file: Path | None,
) -> None:  # fmt: skip
    """Medians of some rounds."""
    figures: dict[str, list[list[float]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if teacher is None:
            make_tokenizer(folder / "tokenizer")
        if corpus is None:
            corpus = write_corpus(folder / "corpus.jsonl", num_documents=max_tokens // 30)
        for number in range(rounds):
            for variant, workers in VARIANTS.items():
                config = DumpConfig(
                    keep=Tokens() if teacher is None else TopPK(),
                    tokenizer=str(folder / "tokenizer") if teacher is None else None,
                    teacher=teacher, corpus=[corpus], out=folder / f"{number} {variant}",
                    max_tokens=max_tokens, sequence_length=sequence_length,
                    sequences_per_shard=sequences_per_shard,
                )  # fmt: skip
                process = FORKED.Process(target=dump, args=(config, workers, folder / "record"))
                process.start()
                process.join()
                if process.exitcode:
                    raise click.ClickException(f"{variant} failed")
                figures[variant].append(json.loads((folder / "record").read_text()))
    found = {
        variant: dict(zip(("start_s", "tokens_per_s", "ms_per_shard"),
                          map(statistics.median, zip(*rows, strict=True)), strict=True))
        for variant, rows in figures.items()
    }  # fmt: skip
    click.echo(f"{'':<12}{'start, s':>10}{'tokens/s':>12}{'ms per shard':>14}")
    for variant, row in found.items():
        click.echo(f"{variant:<12}{row['start_s']:>10.1f}{row['tokens_per_s']:>12,.0f}"
                   f"{row['ms_per_shard']:>14.1f}")  # fmt: skip
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
