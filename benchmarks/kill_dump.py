"""Kills dump-logits at chosen moments, continues it, and compares the dataset with one left alone.

A history is one dataset: made, killed some times, continued by the same command, extended, killed
again, and finished. Processes are started alone, as two ranks, or as two Ray workers; what dies is
one process, a worker, the whole group, or (by SIGTERM) the process that was started. The moment is
read off the folder, polled without a pause. What an earlier kill left there is no moment:

    tokenising   the run appends to a token store that is not finished
    row group    a shard has a temporary file
    two names    a Parquet file has its name, its sidecar does not
    extension    the run has just removed a short last shard, or writes while that is missing
    retry        a shard that an earlier kill interrupted is being written again

Each run aims at the moment and the launch with the fewest hits. A kill is a hit if the folder still
shows the moment once the signal is sent. A process that ends on SIGTERM may finish its step: there
it is enough that the moment was seen.

After every kill no shard that was published may be gone or changed (but the short last one of an
extension). At the end of a history the same command says "complete", every check passes, and the
shards are those of the dataset left alone: byte for byte, or, for an engine whose floats depend on
the batch, row by row within its noise.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from importlib import import_module
from itertools import product
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
STATES = ("tokenising", "row group", "two names", "extension", "retry")
TOKENISING, ROW_GROUP, TWO_NAMES, EXTENSION, RETRY = STATES
OPTIONS: dict[str, list[list[str]]] = {
    "alone": [[]],
    "ranks": [["--rank", "0", "--world-size", "2"], ["--rank", "1", "--world-size", "2"]],
    "workers": [["--workers", "2"]],
}
# Each process is forked from one that has the imports, most of a run's seconds.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["cli", "teacher_dump.dump", "tests.tiny_teacher", "pandas"])
# Seconds between seeing a moment and the kill, at most.
MOST_LATE_S = {TOKENISING: 0.5, TWO_NAMES: 0.0}
SIZES = (30_000, 60_000)  # tokens; the last shards of both are short


class Killer:
    """The datasets of one benchmark, and what was killed when."""

    def __init__(self, folder: Path, engine: str, launches: list[str], seed: int) -> None:
        self.folder, self._log = folder, folder / "log"
        self._engine = engine
        self._random = random.Random(seed)
        self.hits = dict.fromkeys(product(STATES, launches), 0)
        self.victims: Counter[str] = Counter()
        self.histories = self.same_bytes = 0
        teacher, corpus = make_inputs(folder, engine)
        made_by = (
            ["--keep", "tokens", "--tokenizer"]
            if engine == "tokens"
            else ["--engine", engine, "--teacher"]
        )
        self._words = [
            *made_by, str(teacher), "--corpus", str(corpus), "--sequence-length", "64",
            "--sequences-per-shard", "4", "--held-out", "0.1",
        ]  # fmt: skip
        self._finish(self.folder / "alone", SIZES[1])
        self._alone = files_of(self.folder / "alone")

    def history(self, kills: int, deadline: float) -> None:
        """One dataset with at most this many kills. ClickException if anything is wrong with it."""
        out = self.folder / f"history-{self.histories}"
        interrupted: set[str] = set()
        for max_tokens in SIZES:
            outgrown = _short_shards(out)
            for _ in range(kills // 2):
                before = files_of(out)
                # What this size has not written again yet.
                short = {n for n in outgrown if before.get(n) in (None, outgrown[n])}
                wanted, launch = self._aim(out, short, interrupted - before.keys())
                if time.monotonic() > deadline or not self._run_and_kill(
                    out, max_tokens, launch, wanted, short, interrupted
                ):
                    break
                after = files_of(out)
                lost = {n for n in before.keys() - short if after.get(n) != before[n]}
                if lost:
                    raise click.ClickException(f"{out}: a kill lost or changed {sorted(lost)}")
                interrupted |= _temporary_shards(_names(out))
            self._finish(out, max_tokens)
        self._compare(out)
        self.histories += 1

    def _aim(self, out: Path, short: set[str], interrupted: set[str]) -> tuple[str, str]:
        """The moment and the launch with the fewest hits, of those that the next run can have."""
        can_have = {
            TOKENISING: not (out / "tokens" / "store.json").exists(),
            EXTENSION: bool(short),
            RETRY: bool(interrupted),
        }
        aims = [aim for aim in self.hits if can_have.get(aim[0], True)]
        return min(aims, key=lambda aim: self.hits[aim])

    def _run_and_kill(
        self, out: Path, max_tokens: int, launch: str, wanted: str, short: set[str],
        interrupted: set[str],
    ) -> bool:  # fmt: skip
        """Run the command until the wanted moment, and kill something. False: it never came."""
        old = _names(out)

        def is_now() -> bool:
            return wanted in _states(out, short, interrupted, old)

        processes = self._start(out, max_tokens, launch)
        try:
            is_over = False
            while not (is_over or is_now()):
                is_over = not any(process.is_alive() for process in processes)
            if any(process.exitcode for process in processes):
                raise click.ClickException(f"{out}: {self._log.read_text()[-2000:]}")
            if is_over:
                return False
            time.sleep(self._random.random() * MOST_LATE_S.get(wanted, 0.001))
            way = self._kill(processes, launch)
            is_hit = way == "SIGTERM" or is_now()
        finally:
            _end(processes)
        self.hits[wanted, launch] += is_hit
        self.victims[f"{launch}: {way}{'' if is_hit else ', too late'}"] += 1
        return True

    def _kill(self, processes: list[ForkServerProcess], launch: str) -> str:
        """Send the signal; what died."""
        victim = self._random.choice(processes)
        ways = ["process", "group", "SIGTERM"]
        way = self._random.choice([*ways, "worker"] if launch == "workers" else ways)
        if way == "group":
            for process in processes:
                _kill_group(process)
        elif way == "worker":
            for worker in _children_named(_id_of(victim), "RayWorker")[:1]:
                os.kill(worker, signal.SIGKILL)
        elif way == "process":
            victim.kill()
        else:
            victim.terminate()
        return way

    def _start(self, out: Path, max_tokens: int, launch: str) -> list[ForkServerProcess]:
        words = [*self._words, "--out", str(out), "--max-tokens", str(max_tokens)]
        words_of = [[*words, *more] for more in OPTIONS[launch]]
        processes = [FORKED.Process(target=_dump, args=(each, self._log)) for each in words_of]
        for process in processes:
            process.start()
        return processes

    def _finish(self, out: Path, max_tokens: int) -> None:
        """Run to the end, and once more."""
        for expected in ("", "complete, nothing to do"):
            (process,) = self._start(out, max_tokens, "alone")
            process.join()
            said = self._log.read_text()
            if process.exitcode or expected not in said:
                raise click.ClickException(f"{out}: {said[-2000:]}")

    def _compare(self, out: Path) -> None:
        from shards import inspect

        problems = inspect.verify(out)
        if problems:
            raise click.ClickException(f"{out}: {problems}")
        files = files_of(out)
        if files.keys() != self._alone.keys():
            raise click.ClickException(f"{out}: other shards: {files.keys() ^ self._alone.keys()}")
        if files == self._alone:
            self.same_bytes += 1
        elif self._engine == "tokens":
            raise click.ClickException(f"{out}: other bytes than the dataset left alone")
        else:
            _compare_rows(self.folder / "alone", out)


def make_inputs(folder: Path, engine: str) -> tuple[Path, Path]:
    """A tiny teacher, or a tokenizer alone, and text that takes a second to tokenise."""
    tiny = import_module("tests.tiny_teacher")
    teacher = folder / "teacher"
    if engine == "tokens":
        tiny.make_tokenizer(teacher)
    else:
        tiny.make_tiny_teacher(teacher)
    corpus: Path = tiny.write_corpus(folder / "corpus.jsonl", num_documents=20_000)
    return teacher, corpus


def files_of(out: Path) -> dict[str, bytes]:
    """The Parquet files of whole shards."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.glob("*/*.parquet")
        if path.with_suffix(".json").exists()
    }


def _compare_rows(alone: Path, out: Path) -> None:
    all_rows = import_module("tests.tiny_teacher").all_rows
    rows, others = all_rows(alone), all_rows(out)
    shared = entries = 0
    for key, row in rows.items():
        other = others[key]
        if not (row.tokens == other.tokens).all():
            raise click.ClickException(f"{out}: {key}: other tokens")
        difference = np.abs(row.label_logprobs - other.label_logprobs)
        if (difference > 0.2).any() or difference.mean() > 0.02:  # bfloat16 in another batch
            raise click.ClickException(f"{out}: {key}: labels differ by {difference.max()}")
        here, there = _entries(row), _entries(other)
        shared += len(here & there)
        entries += max(len(here), len(there))
    if shared < 0.9 * entries:  # rounding moves some across a border
        raise click.ClickException(f"{out}: shares {shared} of {entries} entries")


def _entries(row: Any) -> set[tuple[int, int]]:
    """The positions and ids of what a row kept."""
    positions = np.repeat(np.arange(len(row.counts)), row.counts)
    return set(zip(positions.tolist(), row.ids.tolist(), strict=True))


def _names(out: Path) -> set[str]:
    """The names in the folders of shards, and one that changes with the file of tokens."""
    names: set[str] = set()
    for split in ("train", "validation"):
        with contextlib.suppress(FileNotFoundError):
            names |= {f"{split}/{name}" for name in os.listdir(out / split)}
    with contextlib.suppress(FileNotFoundError):
        names.add(f"{TOKENISING}/{(out / 'tokens' / 'train.tokens').stat().st_mtime_ns}")
    return names


def _states(out: Path, short: set[str], interrupted: set[str], old: set[str]) -> set[str]:
    """What a run is doing, as the folder shows it; `old` are the names of before the run."""
    names = _names(out)
    new = names - old
    if not (out / "tokens" / "store.json").exists():
        return {TOKENISING} if any(n.startswith(TOKENISING) for n in new) else set()
    written = _temporary_shards(new)
    is_on = {
        TWO_NAMES: any(n.endswith(".parquet") and n[:-8] + ".json" not in names for n in new),
        EXTENSION: bool((short & old) - names) or bool(short - names and written),
        RETRY: bool(written & interrupted),
        ROW_GROUP: bool(written),
    }
    return {state for state, is_now in is_on.items() if is_now}


def _temporary_shards(names: set[str]) -> set[str]:
    """The names of shards that have a temporary Parquet file."""
    return {
        f"{split}/{name[1:].partition('.parquet.')[0]}.parquet"
        for split, _, name in (path.partition("/") for path in names)
        if name.endswith(".tmp") and ".parquet." in name
    }


def _short_shards(out: Path) -> dict[str, bytes]:
    """The last shard of each split if it is short: an extension writes it again."""
    from shards.manifest import load_manifest
    from shards.writer import shard_name

    if not (out / "manifest.json").exists():
        return {}
    manifest, files = load_manifest(out), files_of(out)
    per_shard = manifest.spec.layout.sequences_per_shard
    names = [
        f"{split}/{shard_name(size.sequences // per_shard)}"
        for split, size in manifest.splits.items()
        if size.sequences % per_shard
    ]
    return {name: files[name] for name in names}


def _children_named(session: int, name: str) -> list[int]:
    """Processes of a session with this word in their title."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                title = (entry / "cmdline").read_bytes().decode(errors="replace")
                of_session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
            except OSError:
                continue
            if name in title and of_session == session:
                found.append(int(entry.name))
    return found


def _end(processes: list[ForkServerProcess]) -> None:
    """End what is left; a session may outlive the process that led it."""
    for process in processes:
        process.join(0.5)
        _kill_group(process)
        process.join()


def _kill_group(process: ForkServerProcess) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(_id_of(process), signal.SIGKILL)


def _id_of(process: ForkServerProcess) -> int:
    assert process.pid is not None
    return process.pid


def _dump(words: list[str], log: Path) -> None:
    """The command, in a session of its own."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import_module("cli").dump_logits.main(words, prog_name="dump-logits")


@click.command()
@click.option("--hits", default=10, help="Kills in each moment of each launch.")
@click.option("--kills", default=12, help="Kills of one history, at most.")
@click.option("--engine", default="tokens", help="tokens (no engine), vllm or transformers.")
@click.option("--launch", "launches", multiple=True, default=("alone", "ranks"),
              type=click.Choice(list(OPTIONS)), help="Repeatable.")  # fmt: skip
@click.option("--seconds", default=3000.0, help="Kill nothing after this time.")
@click.option("--seed", default=0)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    hits: int, kills: int, engine: str, launches: tuple[str, ...], seconds: float, seed: int,
    json_file: Path | None,
) -> None:  # fmt: skip
    """Kill until every moment was hit often enough."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        killer = Killer(Path(folder), engine, list(launches), seed)
        while min(killer.hits.values()) < hits and time.monotonic() - started < seconds:
            killer.history(kills, started + seconds)
            click.echo(f"{killer.histories} histories, {sum(killer.victims.values())} kills")
    found: dict[str, Any] = {
        "engine": engine,
        "hits": {
            launch: {state: killer.hits[state, launch] for state in STATES} for launch in launches
        },
        "victims": dict(sorted(killer.victims.items())),
        "histories": killer.histories,
        "same_bytes": killer.same_bytes,
        "seconds": round(time.monotonic() - started),
    }
    for (state, launch), number in killer.hits.items():
        click.echo(f"{state:<12}{launch:<10}{number:>5}")
    for victim, number in found["victims"].items():
        click.echo(f"{victim:<32}{number:>5}")
    click.echo(
        f"{killer.histories} datasets equal to the one left alone, {killer.same_bytes} of them byte"
        " for byte"
    )
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
