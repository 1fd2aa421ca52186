"""Several processes write one dataset: ranks, the shards each takes, what each waits for."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import inspect
from shards.errors import IdentityMismatchError, InputError, RunError
from shards.folder.completeness import missing_shards
from shards.keep import Tokens
from shards.manifest import load_manifest
from shards.options import OptionError
from teacher_dump import coordinate
from teacher_dump.collector import ShardPlan
from teacher_dump.config import DumpConfig
from teacher_dump.coordinate import asked_spec, planned_by_another
from teacher_dump.corpus.listing import list_corpus
from teacher_dump.dump import run
from teacher_dump.pass_progress import PassProgress
from teacher_dump.prepare import prepare
from teacher_dump.processes.preparing import PREPARING_NAME, Patience, sign_of_life, wait_for
from teacher_dump.processes.ranks import ClusterOptions, Rank, find_rank
from teacher_dump.processes.shard_queue import ShardQueue
from teacher_dump.shard_pass import run_pass
from tests.tiny_teacher import make_tokenizer, write_corpus

NO_OPTIONS = ClusterOptions()


def config_of(folder: Path, **more: object) -> DumpConfig:
    """A dataset of tokens alone: all of a dump but the engine."""
    tokenizer, corpus = folder / "tokenizer", folder / "corpus.jsonl"
    if not corpus.exists():
        make_tokenizer(tokenizer)
        write_corpus(corpus, num_documents=60)
    values: dict[str, object] = {
        "keep": Tokens(), "tokenizer": str(tokenizer), "corpus": [corpus], "out": folder / "out",
        "sequence_length": 32, "sequences_per_shard": 4, "held_out": 0.1,
    }  # fmt: skip
    return DumpConfig(**{**values, **more})  # type: ignore[arg-type]


SLURM_STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "3",
    "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "5",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "rank", "world_size", "local_rank"),
    [
        ({}, 0, 1, None),
        ({"RANK": "2", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, 2, 8, 0),
        (SLURM_STEP, 3, 4, 1),
        # what a batch script sees without srun: one process, whatever was allocated
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, 0, 1, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 0, 1, None),
        (ARRAY, 2, 3, None),
        (ARRAY | SLURM_STEP, 2 * 4 + 3, 12, 1),
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "1"}, 0, 1, None),
        (ARRAY | {"RANK": "0", "WORLD_SIZE": "1"}, 0, 1, None),
    ],
)
def test_a_launcher_says_which_rank_this_is(
    environ: dict[str, str], rank: int, world_size: int, local_rank: int | None
) -> None:
    found = find_rank(NO_OPTIONS, environ)
    assert (found.rank, found.world_size, found.local_rank) == (rank, world_size, local_rank)
    given = find_rank(ClusterOptions(rank=1, world_size=2), environ)
    assert (given.rank, given.world_size) == (1, 2)
    assert find_rank(ClusterOptions(prepare=True), environ) == Rank()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "two", "WORLD_SIZE": "8"}, "RANK=two: expected a number"),
        ({"RANK": "8", "WORLD_SIZE": "8"}, "rank 8 of 8 is no rank"),
        (ARRAY | {"SLURM_ARRAY_TASK_MAX": "6"}, "the array has gaps"),
    ],
)
def test_a_launcher_that_contradicts_itself_is_an_error(
    environ: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        find_rank(NO_OPTIONS, environ)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "world_size: missing"),
        ({"world_size": 2}, "rank: missing"),
        ({"rank": 2, "world_size": 2}, "rank 2: expected a number from 0 to 1"),
        ({"rank": 0, "world_size": 0}, "world_size 0: expected at least 1"),
        ({"rank": 0, "world_size": 2, "prepare": True}, "prepare: one process prepares"),
    ],
)
def test_options_that_cannot_be_meant_are_errors(options: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ClusterOptions(**options)  # type: ignore[arg-type]


def test_a_prepared_dataset_has_tokens_and_manifest_and_no_shard(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    summary = run(config, ClusterOptions(prepare=True))
    assert summary.prepared
    assert summary.sequences == sum(s.sequences for s in load_manifest(config.out).splits.values())
    assert not (config.out / "train").exists()
    assert not (config.out / PREPARING_NAME).exists()
    store = (config.out / "tokens" / "train.tokens").stat()
    assert run(config).missing == 0
    assert (config.out / "tokens" / "train.tokens").stat() == store  # tokenised once
    assert inspect.verify(config.out) == []


def _run_ranks(config: DumpConfig, world_size: int, ranks: list[int]) -> dict[int, set[str]]:
    """The shards that each rank published, one rank after the other."""
    written = {}
    for rank in ranks:
        before = set(config.out.glob("*/*.parquet"))
        run(config, ClusterOptions(rank=rank, world_size=world_size))
        after = set(config.out.glob("*/*.parquet"))
        written[rank] = {f"{path.parent.name}/{path.name}" for path in after - before}
    return written


def test_a_rank_alone_writes_what_the_others_do_not(tmp_path: Path) -> None:
    """Nothing depends on a common start: rank 2 of 3 comes first and finds all the work."""
    config = config_of(tmp_path)
    run(config, ClusterOptions(prepare=True))
    written = _run_ranks(config, 3, [2, 0, 1])
    assert len(written[2]) > 10
    assert written[0] == written[1] == set()
    assert load_manifest(config.out).complete  # rank 0 says so
    assert inspect.verify(config.out) == []


def test_shards_are_owned_by_their_number_whatever_the_world_size(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run(config, ClusterOptions(prepare=True))
    manifest = load_manifest(config.out)
    num_train, num_validation = (
        manifest.spec.layout.num_shards(manifest.splits[name].sequences)
        for name in ("train", "validation")
    )
    for world_size in (1, 2, 5):
        owned = []
        for rank in range(world_size):
            queue = ShardQueue(config.out, manifest, Rank(rank=rank, world_size=world_size))
            numbers = [
                shard + (num_train if split != "train" else 0)
                for split, shards in queue.own.items()
                for shard, _ in shards
            ]
            assert numbers == sorted(numbers)
            assert all(number % world_size == rank for number in numbers)
            owned += numbers
        assert sorted(owned) == list(range(num_train + num_validation))


def test_a_helper_comes_from_the_end_and_leaves_what_others_write(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run(config, ClusterOptions(prepare=True))
    manifest = load_manifest(config.out)
    num_train = manifest.spec.layout.num_shards(manifest.splits["train"].sequences)
    queue = ShardQueue(config.out, manifest, Rank(rank=90, world_size=91))
    assert [*map(len, queue.own.values())] == [0, 0]
    (config.out / "train").mkdir()
    for shard in range(1, num_train):
        name = f".shard-{shard:06}.parquet.0123456789abcdef.tmp"
        (config.out / "train" / name).touch()
    (config.out / "validation").mkdir()
    for shard in range(10):
        name = f".shard-{shard:06}.parquet.0123456789abcdef.tmp"
        (config.out / "validation" / name).touch()
    first, second = (plan for plan, _ in zip(iter(queue), range(2), strict=False))
    assert (first.split, first.shard) == ("train", 0)  # the only one that nobody writes
    assert (second.split, second.shard) != (first.split, first.shard)


@settings(max_examples=25, deadline=None)
@given(
    world_size=st.integers(1, 5),
    there=st.sets(st.integers(0, 40)),
    order=st.randoms(use_true_random=False),
)
def test_ranks_in_any_interleaving_take_every_missing_shard(
    tmp_path_factory: pytest.TempPathFactory,
    world_size: int,
    there: set[int],
    order: st.random.Random,  # type: ignore[name-defined]
) -> None:
    """A simulation: ranks take and finish shards in random turns, some die, the rest do it all."""
    folder = tmp_path_factory.getbasetemp() / "simulated"
    folder.mkdir(exist_ok=True)
    config = config_of(folder)
    if not config.out.exists():
        run(config, ClusterOptions(prepare=True))
    manifest = load_manifest(config.out)
    state: set[tuple[str, int]] = set()

    class Simulated(ShardQueue):
        def _missing(self):  # type: ignore[no-untyped-def]
            for split, shards, first in super()._missing():
                yield split, shards.without([n for name, n in state if name == split]), first

        def is_missing(self, plan):  # type: ignore[no-untyped-def]
            return (plan.split, plan.shard) not in state

    plain = ShardQueue(config.out, manifest, Rank())
    everything = {(split, n) for split, shards in plain.own.items() for n, _ in shards}
    state |= {key for n, key in enumerate(sorted(everything)) if n in there}
    queues = [
        iter(Simulated(config.out, manifest, Rank(rank=r, world_size=world_size)))
        for r in range(world_size)
    ]
    alive = dict(enumerate(queues))
    written: list[tuple[str, int]] = []
    while alive:
        rank = order.choice(sorted(alive))
        if len(alive) > 1 and order.random() < 0.05:
            del alive[rank]
            continue
        plan = next(alive[rank], None)
        if plan is None:
            assert state == everything  # nobody leaves before all is there
            del alive[rank]
            continue
        state.add((plan.split, plan.shard))
        written.append((plan.split, plan.shard))
    assert state == everything
    assert len(written) == len(set(written))


def test_a_rank_waits_for_the_whole_of_what_rank_0_makes(tmp_path: Path) -> None:
    config = config_of(tmp_path, max_tokens=400)
    ready = prepare(config)
    asked = asked_spec(config, ready)
    assert planned_by_another(config, ready, asked) is None
    run(config, ClusterOptions(prepare=True))
    found = planned_by_another(config, ready, asked)
    assert found is not None
    assert found.manifest == load_manifest(config.out)
    larger = replace(config, max_tokens=800)
    assert planned_by_another(larger, ready, asked) is None  # rank 0 extends it first
    other = replace(config, seed=1)
    assert planned_by_another(other, prepare(other), asked_spec(other, prepare(other))) is None
    run(config)
    with pytest.raises(IdentityMismatchError, match="seed"):
        planned_by_another(other, prepare(other), asked_spec(other, prepare(other)))


def test_a_rank_of_before_an_extension_publishes_no_short_shard(tmp_path: Path) -> None:
    """It has the older manifest, and the short last shard of train is the one that is missing."""
    config = config_of(tmp_path, max_tokens=350, held_out=0.0)
    run(config, ClusterOptions(prepare=True))
    ready = prepare(config)
    old = planned_by_another(config, ready, asked_spec(config, ready))
    assert old is not None
    *_, (shard, sequences) = missing_shards(config.out, old.manifest, "train")
    assert len(sequences) < 4
    plan = ShardPlan(split="train", shard=shard, sequences=sequences)
    run(replace(config, max_tokens=800), ClusterOptions(prepare=True))
    message = rf"train/shard-00000{shard}.parquet: holds 4 sequences, not {len(sequences)}, since"
    with pytest.raises(RunError, match=message):
        run_pass(config, ready.tokenizer, [plan], old, None, PassProgress())
    assert list((config.out / "train").iterdir()) == []
    with pytest.raises(RunError, match=message):
        list(ShardQueue(config.out, old.manifest, Rank()))
    run(replace(config, max_tokens=800))
    with pytest.raises(RunError, match=message):  # the shard is there and longer: nothing to delete
        ShardQueue(config.out, old.manifest, Rank()).is_missing(plan)
    assert inspect.verify(config.out) == []


def test_a_rank_of_a_dataset_that_was_replaced_publishes_no_shard(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run(config, ClusterOptions(prepare=True))
    ready = prepare(config)
    old = planned_by_another(config, ready, asked_spec(config, ready))
    assert old is not None
    plans = list(ShardQueue(config.out, old.manifest, Rank()))
    run(replace(config, seed=1), ClusterOptions(prepare=True))
    with pytest.raises(RunError, match="is of a dataset that another command has replaced"):
        run_pass(config, ready.tokenizer, plans, old, None, PassProgress())
    assert list(config.out.glob("*/*.parquet")) == []
    run(replace(config, seed=1))
    assert inspect.verify(config.out) == []


def test_a_task_that_starts_several_ranks_gives_them_no_place_on_its_machine() -> None:
    options = ClusterOptions(rank=3, world_size=8)
    batch = {"SLURM_LOCALID": "0", "SLURM_PROCID": "0"}
    assert find_rank(options, batch).local_rank is None
    two_machines = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert find_rank(options, two_machines).local_rank is None
    assert find_rank(ClusterOptions(rank=3, world_size=4), SLURM_STEP).local_rank == 1
    array = ClusterOptions(rank=11, world_size=12)
    assert find_rank(array, ARRAY | SLURM_STEP).local_rank == 1


QUICK = Patience(look_every=0.02, sign_every=0.02, first_sign=0.3, next_sign=0.3)


def test_a_rank_that_waits_never_makes_tokens_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    run(config, ClusterOptions(prepare=True))
    ready = prepare(config)
    asked = asked_spec(config, ready)
    tokens = config.out / "tokens"
    compare = coordinate._check_same

    def while_rank_0_begins_anew(*arguments: Any) -> None:
        (tokens / "store.json").unlink()
        compare(*arguments)

    monkeypatch.setattr(coordinate, "_check_same", while_rank_0_begins_anew)
    before = sorted(path.name for path in tokens.iterdir())
    assert planned_by_another(config, ready, asked) is None
    assert sorted(path.name for path in tokens.iterdir()) == [
        name for name in before if name != "store.json"
    ]


def test_whole_paths_are_of_folders_and_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "[v1]"
    (here / "teacher").mkdir(parents=True)
    (here / "gpt2").write_text("no model")
    (here / "a.txt").write_text("text")
    monkeypatch.chdir(here)
    for teacher, expected in (("teacher", str(here / "teacher")), ("gpt2", "gpt2")):
        config = DumpConfig(teacher=teacher, corpus=(Path("a.txt"), Path("*.txt")), out=Path("out"))
        found = config.with_absolute_paths()
        assert found.teacher == expected
        assert found.out == here / "out"
        for path in found.corpus:
            assert [file.path for file in list_corpus([path]).files] == [here / "a.txt"]


def test_waiting_ends_with_one_line_if_nobody_prepares(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"rank 0 did not start within 0 s.*dump-logits --prepare"):
        wait_for(tmp_path, lambda: None, QUICK)
    # what a rank 0 that was killed left says nothing new
    (tmp_path / PREPARING_NAME).write_text(json.dumps(["host", 1, 7, "tokenising: 3 documents"]))
    with pytest.raises(RunError, match=r"no sign for 0 s \(it was at: tokenising: 3 documents\)"):
        wait_for(tmp_path, lambda: None, QUICK)


def test_a_sign_that_a_killed_rank_0_left_does_not_shorten_the_wait(tmp_path: Path) -> None:
    patience = Patience(look_every=0.02, sign_every=0.02, first_sign=30.0, next_sign=0.2)
    (tmp_path / PREPARING_NAME).write_text(json.dumps(["host", 1, 7, "tokenising"]))
    planned_at = time.monotonic() + 1.0
    found = wait_for(tmp_path, lambda: "it" if time.monotonic() > planned_at else None, patience)
    assert found == "it"


def test_a_rank_0_that_starts_late_and_dies_is_noticed_soon(tmp_path: Path) -> None:
    patience = Patience(look_every=0.02, sign_every=0.02, first_sign=30.0, next_sign=0.2)

    def start_late_and_die() -> None:
        time.sleep(0.5)
        (tmp_path / PREPARING_NAME).write_text(json.dumps(["host", 1, 0, "tokenising"]))

    thread = threading.Thread(target=start_late_and_die)
    thread.start()
    with pytest.raises(RunError, match="no sign for 0 s"):
        wait_for(tmp_path, lambda: None, patience)
    thread.join()


def test_waiting_goes_on_as_long_as_rank_0_shows_that_it_works(tmp_path: Path) -> None:
    done: list[str] = []

    def prepare_slowly() -> None:
        with sign_of_life(tmp_path, QUICK) as sign:
            sign.text = "tokenising"
            time.sleep(1.0)  # more than three times what a rank waits without a sign
            done.append("planned")

    thread = threading.Thread(target=prepare_slowly)
    thread.start()
    assert wait_for(tmp_path, lambda: done[0] if done else None, QUICK) == "planned"
    thread.join()
    assert list(tmp_path.iterdir()) == []


def test_real_ranks_at_once_write_each_shard_once(tmp_path: Path) -> None:
    """Three processes, rank 0 last; their shards together are those of one process."""
    config = config_of(tmp_path)
    alone = replace(config, out=tmp_path / "alone")
    run(alone)
    root = Path(__file__).parent.parent
    processes = []
    for rank in (2, 1, 0):
        command = [
            sys.executable, "-m", "cli", "dump-logits", "--keep", "tokens",
            "--tokenizer", str(config.tokenizer), "--corpus", str(config.corpus[0]),
            "--out", str(config.out), "--sequence-length", "32", "--sequences-per-shard", "4",
            "--held-out", "0.1", "--rank", str(rank), "--world-size", "3",
        ]  # fmt: skip
        processes.append(
            subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True)
        )  # fmt: skip
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert load_manifest(config.out).complete
    assert inspect.verify(config.out) == []
    for path in alone.out.glob("*/*.parquet"):
        other = config.out / path.relative_to(alone.out)
        assert other.read_bytes() == path.read_bytes()
    assert list(config.out.glob("*/.*.tmp")) == []
