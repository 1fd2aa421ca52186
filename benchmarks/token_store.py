"""How fast a corpus becomes a token store: text beside the bare tokenizer, tokens by themselves.

The bare tokenizer encodes the same documents in batches as large and keeps nothing; like a store it
begins with no word known. Tokens are the text's own, as `.npy`, `.bin` and Parquet. Files lie in
the page cache.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from teacher_dump.corpus.listing import list_corpus
from teacher_dump.corpus.rules import TokenisingRules
from teacher_dump.tokenizer import load_tokenizer
from teacher_dump.tokens.encoding import make_encoder
from teacher_dump.tokens.open_store import open_or_build

BARE, TEXT = "bare tokenizer", "text.jsonl"
BATCH_DOCUMENTS = 200  # of the demo's text about a million characters, as the builder takes them


def write_inputs(
    folder: Path, texts: list[str], tokenizer: Any, *, text_copies: int, token_copies: int
) -> None:
    """text.jsonl and its tokens as tokens.npy, tokens.bin, tokens.parquet, several times over."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with (folder / TEXT).open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts * text_copies)
    encoded = make_encoder(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    documents = [np.array([*e.ids, tokenizer.eos_token_id], np.uint16) for e in encoded]
    flat = np.tile(np.concatenate(documents), token_copies)
    np.save(folder / "tokens.npy", flat)
    flat.tofile(folder / "tokens.bin")
    lists = pa.array([d.tolist() for d in documents], pa.list_(pa.uint16()))
    table = pa.concat_tables([pa.table({"tokens": lists})] * token_copies)
    pq.write_table(table, folder / "tokens.parquet")


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), default=ROOT / "build" / "teacher")
@click.option(
    "--corpus", type=click.Path(path_type=Path), default=ROOT / "build" / "demo" / "corpus.jsonl"
)
@click.option("--text-copies", default=8, show_default=True, help="Size of the text corpus.")
@click.option("--token-copies", default=40, show_default=True, help="Size of the token corpora.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
def main(
    teacher: Path,
    corpus: Path,
    text_copies: int,
    token_copies: int,
    rounds: int,
    json_file: Path | None,
) -> None:
    """Tokens/s of building a token store (`make demo` makes the inputs)."""
    tokenizer = load_tokenizer(teacher)
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    rules = TokenisingRules(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        text_key="text",
        held_out=0.01,
        seed=0,
        token_key="tokens",
    )

    def bare() -> int:
        encoder, total, all_texts = make_encoder(tokenizer), 0, texts * text_copies
        for start in range(0, len(all_texts), BATCH_DOCUMENTS):
            batch = all_texts[start : start + BATCH_DOCUMENTS]
            encodings = encoder.encode_batch_fast(batch, add_special_tokens=False)
            total += sum(len(encoding.ids) + 1 for encoding in encodings)
        return total

    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder)
        write_inputs(inputs, texts, tokenizer, text_copies=text_copies, token_copies=token_copies)
        number = iter(range(1_000_000))

        def build(name: str) -> Callable[[], int]:
            def run() -> int:
                out = inputs / str(next(number))
                store = open_or_build(
                    out, list_corpus([inputs / name]).files, tokenizer, rules, lambda *_: None
                )
                return sum(
                    store.sequences(split, 1024).num_positions + 1
                    for split in ("train", "validation")
                )

            return run

        modes: dict[str, Callable[[], int]] = {BARE: bare}
        for file in (TEXT, "tokens.npy", "tokens.bin", "tokens.parquet"):
            modes[file] = build(file)
        speeds: dict[str, list[float]] = {mode: [] for mode in modes}
        for _ in range(rounds):
            for mode, run in modes.items():
                wall, used = time.perf_counter(), time.process_time()
                tokens = run()
                cores = (time.process_time() - used) / (time.perf_counter() - wall)
                speeds[mode].append(tokens / (time.perf_counter() - wall) / 1e6)
                click.echo(f"{mode}: {tokens:,} tokens, {cores:.2f} cores", err=True)
    medians = {mode: statistics.median(values) for mode, values in speeds.items()}
    for mode, median in medians.items():
        click.echo(f"{mode:<16}{median:>8.2f} M tokens/s")
    ratio = statistics.median(
        store / alone for store, alone in zip(speeds[TEXT], speeds[BARE], strict=True)
    )
    click.echo(f"{TEXT} / {BARE}: {ratio:.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    click.echo(f"peak resident {peak / 1024:,.0f} MiB, mapped files included")
    if json_file is not None:
        figures = {"M tokens/s": medians, f"{TEXT} / {BARE}": ratio, "peak_resident_kib": peak}
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
