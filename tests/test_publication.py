"""However writers of one shard meet or end, it becomes one whole shard, and nothing is overwritten.

A writer is killed in three ways here: `stop_after` leaves what a kill after a step would leave,
threads are held at a step while another writer goes on, and real processes get SIGKILL.
"""

import errno
import hashlib
import os
import random
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.errors import RunError, ShardCorruptError, ShardError
from shards.files import durable
from shards.folder import publication
from shards.folder.completeness import is_missing
from shards.folder.continuing import create_or_continue
from shards.folder.publication import PARQUET_NAMED, STEPS, StoppedError, adopt
from shards.footer import Footer
from shards.keep import Threshold, Tokens
from shards.manifest import SplitSize
from shards.reader import ShardReader, verify_shard
from shards.schema import writer_options
from shards.sidecar import Sidecar, sidecar_path
from shards.writer import ShardWriter, shard_name
from tests.forked import FORKED
from tests.strategies import assert_rows_equal, example_row, make_spec, write_shard
from tests.tiny_dataset import without_teacher

SPEC = make_spec(sequences_per_shard=8, sequences_per_row_group=3)
ROWS = [example_row(i) for i in range(8)]
# What no two writers of one shard make, so that it shows whose file is there.
OTHER_ROWS = [replace(row, tokens=row.tokens[::-1].copy()) for row in ROWS]
FOOTER = Footer(spec=SPEC, split="train", shard=0)
NAMES = ["shard-000000.json", "shard-000000.parquet"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train").mkdir()
    return tmp_path / "train"


def begin(folder, rows=ROWS, spec=SPEC):
    """A writer that has written all its rows and is about to publish."""
    writer = ShardWriter(folder, shard=0, split="train", spec=spec)
    for first in range(0, len(rows), 3):
        writer.write_rows(rows[first : first + 3])
    return writer


def stop(folder, step, rows=ROWS, spec=SPEC):
    """A writer that is killed after a step."""
    with pytest.raises(StoppedError), begin(folder, rows, spec) as writer:
        writer.publish(stop_after=step)


def orphan(folder, rows=ROWS, spec=SPEC):
    """A Parquet file whose writer was killed before it named the sidecar; nothing else."""
    stop(folder, PARQUET_NAMED, rows, spec)
    durable.remove_old_temporaries(folder, older_than_s=-1)
    assert names(folder) == NAMES[1:]
    return folder / shard_name(0)


def names(folder):
    return sorted(file.name for file in folder.iterdir() if not durable.is_temporary(file.name))


def temporaries(folder):
    return sorted(file.name for file in folder.iterdir() if durable.is_temporary(file.name))


def listing(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def make_old(folder):
    """Set the clock of all temporary files back by a day and a minute."""
    then = time.time() - 86_460
    for name in temporaries(folder):
        os.utime(folder / name, (then, then))


class Watch:
    """Notices when a published name stands for another file, or is gone."""

    def __init__(self, folder):
        self.folder = folder
        self.seen = {}

    def look(self):
        for name in NAMES:
            file = self.folder / name
            if name in self.seen or file.exists():
                found = file.stat().st_ino, file.read_bytes()
                assert self.seen.setdefault(name, found) == found


def check_whole(folder, *candidates):
    """One Parquet file and its own sidecar, holding the rows of one of these writers."""
    assert names(folder) == NAMES
    path = folder / shard_name(0)
    verify_shard(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert Sidecar.read(sidecar_path(path)).sha256 == sha256
    with ShardReader(path) as reader:
        found = [reader.row(i) for i in range(reader.num_rows)]
    whose = [rows for rows in candidates if rows[0].tokens.tolist() == found[0].tokens.tolist()]
    assert len(whose) == 1
    for row, expected in zip(found, whose[0], strict=True):
        assert_rows_equal(row, expected)
    return whose[0]


@pytest.mark.parametrize("step", STEPS)
def test_what_a_killed_writer_leaves_is_completed_by_the_next(folder, step):
    stop(folder, step)
    left = temporaries(folder)
    assert names(folder) == NAMES[1:] * (step in STEPS[2:]) or step == STEPS[3]
    assert len(left) == (1 if step == STEPS[0] else 2)
    watch = Watch(folder)
    watch.look()
    with begin(folder, OTHER_ROWS) as writer:
        sidecar = writer.publish()
    watch.look()
    first_came = check_whole(folder, ROWS, OTHER_ROWS) is ROWS
    assert first_came == (step in STEPS[2:])
    assert sidecar == Sidecar.read(folder / NAMES[0])
    # They are the first writer's, which may be alive on another machine.
    assert temporaries(folder) == left
    durable.remove_old_temporaries(folder)
    assert temporaries(folder) == left
    make_old(folder)
    durable.remove_old_temporaries(folder)
    assert temporaries(folder) == []
    watch.look()
    check_whole(folder, ROWS, OTHER_ROWS)


@pytest.mark.parametrize("second", STEPS)
@pytest.mark.parametrize("first", STEPS)
def test_two_writers_that_are_killed_leave_what_a_third_completes(folder, first, second):
    watch = Watch(folder)
    stop(folder, first)
    watch.look()
    with begin(folder, OTHER_ROWS) as writer:
        try:
            writer.publish(stop_after=second)
            assert first in STEPS[2:]  # it took the other's before it came to that step
        except StoppedError:
            pass
    watch.look()
    third = [replace(row, segments=row.segments + 1) for row in ROWS]
    third = [replace(row, tokens=np.roll(row.tokens, 1)) for row in third]
    with begin(folder, third) as writer:
        writer.publish()
    watch.look()
    check_whole(folder, ROWS, OTHER_ROWS, third)
    make_old(folder)
    durable.remove_old_temporaries(folder)
    assert sorted(os.listdir(folder)) == NAMES


class Held(threading.Thread):
    """A writer that is held after a step until it is let go."""

    def __init__(self, folder, rows, step):
        super().__init__()
        self.writer = begin(folder, rows)
        self.step = step
        self.held = threading.Event()
        self.let_go = threading.Event()
        self.error = None

    def run(self):
        try:
            with self.writer:
                self.writer.publish()
        except BaseException as error:
            self.error = error
        finally:
            self.held.set()

    def start_until_held(self):
        """Returns when it is at its step, or at its end if it does not come to it."""
        self.start()
        assert self.held.wait(20)

    def finish(self):
        self.let_go.set()
        self.join(20)
        assert self.error is None


@pytest.fixture
def holding(monkeypatch):
    def hold(_, step):
        thread = threading.current_thread()
        if isinstance(thread, Held) and thread.step == step:
            thread.held.set()
            assert thread.let_go.wait(20)

    monkeypatch.setattr(publication, "stop_if", hold)


@pytest.mark.parametrize("order", ["in order", "crosswise"])
@pytest.mark.parametrize("second", STEPS)
@pytest.mark.parametrize("first", STEPS)
def test_two_living_writers_both_succeed_wherever_they_meet(folder, holding, first, second, order):
    watch = Watch(folder)
    writers = [Held(folder, ROWS, first), Held(folder, OTHER_ROWS, second)]
    for writer in writers:
        writer.start_until_held()
        watch.look()
    for writer in writers if order == "in order" else writers[::-1]:
        writer.finish()
        watch.look()
    assert sorted(os.listdir(folder)) == NAMES
    check_whole(folder, ROWS, OTHER_ROWS)


def test_who_finds_a_parquet_file_makes_its_sidecar_and_its_writer_agrees(folder, holding):
    first = Held(folder, ROWS, PARQUET_NAMED)
    first.start_until_held()
    assert names(folder) == NAMES[1:]
    inode = (folder / NAMES[1]).stat().st_ino
    with begin(folder, OTHER_ROWS) as second:
        made = second.publish()
    assert made.sha256 == hashlib.sha256((folder / NAMES[1]).read_bytes()).hexdigest()
    sidecar_inode = (folder / NAMES[0]).stat().st_ino
    first.finish()
    assert check_whole(folder, ROWS, OTHER_ROWS) is ROWS
    assert (folder / NAMES[1]).stat().st_ino == inode
    assert (folder / NAMES[0]).stat().st_ino == sidecar_inode


def test_many_writers_at_once_make_one_shard(folder):
    for _ in range(5):
        writers = [begin(folder) for _ in range(4)]
        barrier = threading.Barrier(len(writers))
        errors = []

        def publish(writer, barrier=barrier, errors=errors):
            try:
                barrier.wait(20)
                with writer:
                    writer.publish()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=publish, args=(writer,)) for writer in writers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert errors == []
        assert sorted(os.listdir(folder)) == NAMES
        check_whole(folder, ROWS)
        for name in NAMES:
            (folder / name).unlink()


def publish_slowly(folder, rows, seed, ready):
    """What a process does that will be killed: every step takes long enough to be hit."""
    rng = random.Random(seed)
    publication.stop_if = lambda *_: time.sleep(rng.uniform(0, 0.008))
    with begin(folder, rows) as writer:
        ready.set()
        writer.publish()


def test_processes_that_are_killed_at_any_moment_leave_what_the_next_completes(tmp_path):
    rng = random.Random(0)
    outcomes = []
    for i in range(30):
        folder = tmp_path / str(i) / "train"
        watch = Watch(folder)
        processes = []
        for rows in (ROWS, OTHER_ROWS):
            ready = FORKED.Event()
            arguments = (folder, rows, rng.random(), ready)
            processes.append((FORKED.Process(target=publish_slowly, args=arguments), ready))
        for process, _ in processes:
            process.start()
        for process, ready in processes:
            assert ready.wait(30)
            time.sleep(rng.uniform(0, 0.03))
            if rng.random() < 0.8:
                process.kill()
            watch.look()
        for process, _ in processes:
            process.join(30)
            assert process.exitcode in (0, -signal.SIGKILL)
            outcomes.append((process.exitcode, tuple(names(folder))))
        watch.look()
        with begin(folder) as writer:
            writer.publish()
        watch.look()
        check_whole(folder, ROWS, OTHER_ROWS)
        durable.remove_old_temporaries(folder, older_than_s=-1)
        assert sorted(os.listdir(folder)) == NAMES
    # Otherwise nothing was tried.
    assert len({left for code, left in outcomes if code}) > 1
    assert any(code == 0 for code, _ in outcomes)


@pytest.mark.parametrize(
    ("spec", "make"),
    [
        (SPEC, lambda row: row),
        (make_spec(has_mask=True), lambda row: example_row(row.sequence, has_mask=True)),
        (
            make_spec(keep=Threshold(), has_entropy=False),
            lambda row: example_row(row.sequence, has_tail=False, has_entropy=False),
        ),
        (replace(SPEC, teacher=None, keep=Tokens()), without_teacher),
    ],
    ids=["top-p-k", "masked", "sampled", "tokens"],
)
def test_the_sidecar_that_is_made_is_the_one_that_the_writer_would_have_made(tmp_path, spec, make):
    rows = [make(row) for row in ROWS]
    expected = write_shard(tmp_path / "whole" / "train", rows, spec).with_suffix(".json")
    path = orphan(tmp_path / "train", rows, spec)
    adopt(path, Footer(spec=spec, split="train", shard=0), len(rows))
    assert sidecar_path(path).read_bytes() == expected.read_bytes()
    verify_shard(path)


def check_left_alone(folder, *, message, footer=FOOTER, sequences=8):
    """An orphan is refused with one line that says what to do, and nothing changes."""
    before = listing(folder)
    with pytest.raises(ShardCorruptError) as caught:
        adopt(folder / NAMES[1], footer, sequences)
    text = str(caught.value)
    assert text.startswith(f"{folder / NAMES[1]}: has no sidecar, and none can be made from it: ")
    assert message in text
    assert "delete it, and the same command writes it again" in text
    assert "\n" not in text
    assert listing(folder) == before


def test_a_damaged_orphan_is_refused_wherever_the_damage_is(folder):
    path = orphan(folder)
    intact = path.read_bytes()
    footer = len(intact) - 8 - int.from_bytes(intact[-8:-4], "little")
    metadata = pq.read_metadata(path)
    starts = [metadata.row_group(0).column(i).data_page_offset for i in range(metadata.num_columns)]
    rng = random.Random(0)
    positions = {
        "magic": [0, 3, len(intact) - 1],
        "length of the footer": range(len(intact) - 8, len(intact) - 4),
        "page headers": [start + k for start in starts for k in range(0, 24, 5)],
        "pages": [rng.randrange(4, footer) for _ in range(60)],
        "footer": [rng.randrange(footer, len(intact)) for _ in range(120)],
    }
    for where in positions.values():
        for position in where:
            content = bytearray(intact)
            content[position] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            check_left_alone(folder, message="")
    for size in (0, 1, 11, 12, 100, footer, len(intact) - 8, len(intact) - 1):
        path.write_bytes(intact[:size])
        check_left_alone(folder, message="")
    path.write_bytes(intact)
    adopt(path, FOOTER, 8)
    assert check_whole(folder, ROWS) is ROWS


def test_a_writer_and_a_start_find_a_damaged_orphan_too(folder):
    path = orphan(folder)
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    before = listing(folder)
    with (
        begin(folder) as writer,
        pytest.raises(ShardCorruptError, match=r"shard-000000.parquet: .* delete it"),
    ):
        writer.publish()
    assert listing(folder) == before
    sizes = {"train": SplitSize(sequences=8, positions=128)}
    manifest = create_or_continue(folder.parent / "dataset", SPEC, sizes, {}, {})
    folder = folder.rename(folder.parent / "dataset" / "train")
    with pytest.raises(ShardCorruptError, match=r"shard-000000.parquet: .* delete it"):
        is_missing(folder.parent, manifest, "train", 0, range(8))
    assert listing(folder) == before


def test_an_orphan_of_another_dataset_split_or_shard_is_refused_by_name(tmp_path):
    folder = tmp_path / "train"
    path = orphan(folder)
    content = path.read_bytes()
    other = replace(SPEC, seed=7)
    check_left_alone(
        folder, footer=replace(FOOTER, spec=other), message="it is another shard: shard 0 of split"
    )
    check_left_alone(
        folder, footer=replace(FOOTER, spec=other), message="seed: 7 here, 0 there; delete it"
    )
    check_left_alone(
        folder,
        footer=replace(FOOTER, split="validation"),
        message="it is another shard: shard 0 of split train",
    )
    check_left_alone(
        folder,
        footer=replace(FOOTER, shard=3),
        message="it is another shard: shard 0 of split train",
    )
    check_left_alone(folder, sequences=7, message="it holds 8 sequences, expected 7")
    assert path.read_bytes() == content


def test_an_orphan_of_something_else_is_refused(folder):
    path = folder / NAMES[1]
    pq.write_table(pa.table({"a": [1]}), path)
    check_left_alone(folder, message="a Parquet file, but not a shard of logitshards")
    path.write_text("something else")
    check_left_alone(folder, message="not a Parquet file")
    path.write_bytes(b"")
    check_left_alone(folder, message="")


def test_an_orphan_with_values_that_no_teacher_can_mean_is_refused(folder):
    rows = [replace(row) for row in ROWS]
    rows[4].entropies[3] = np.nan
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shards.writer.problem_with_values", lambda *_: None)
            orphan(folder, rows)
    finally:
        rows[4].entropies[3] = 0
    check_left_alone(folder, message="sequence 4: entropies is nan: the teacher gave no number")


def other_release(columns):
    """How another release of Arrow might write the same rows."""
    return {**writer_options(columns), "data_page_version": "2.0"}


def test_an_orphan_of_another_release_of_arrow_is_not_guessed_at(folder, monkeypatch):
    monkeypatch.setattr("shards.footer.writer_options", other_release)
    orphan(folder)
    monkeypatch.undo()
    check_left_alone(folder, message="encoding its rows again gives other bytes")


def test_a_writer_of_another_release_of_arrow_that_is_alive_disturbs_nobody(
    folder, holding, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("shards.footer.writer_options", other_release)
        first = Held(folder, ROWS, PARQUET_NAMED)
    first.start_until_held()
    check = publication._checked_totals

    def check_while_the_other_goes_on(*arguments):
        first.finish()
        return check(*arguments)

    monkeypatch.setattr(publication, "_checked_totals", check_while_the_other_goes_on)
    with begin(folder, OTHER_ROWS) as second:
        second.publish()
    assert check_whole(folder, ROWS, OTHER_ROWS) is ROWS


@pytest.mark.parametrize("where", ["a writer", "a start"])
def test_a_sidecar_without_its_parquet_file_is_an_error_that_says_so(folder, where):
    path = write_shard(folder, ROWS, SPEC)
    path.unlink()
    before = listing(folder)
    message = r"shard-000000.json: describes a shard that is missing; delete this file"
    if where == "a writer":
        with begin(folder) as writer, pytest.raises(ShardError, match=message):
            writer.publish()
    else:
        sizes = {"train": SplitSize(sequences=8, positions=128)}
        manifest = create_or_continue(folder.parent / "dataset", SPEC, sizes, {}, {})
        folder = folder.rename(folder.parent / "dataset" / "train")
        with pytest.raises(ShardError, match=message):
            is_missing(folder.parent, manifest, "train", 0, range(8))
    assert listing(folder) == before


def test_a_sidecar_of_another_file_is_never_made_to_fit(folder):
    path = write_shard(folder, OTHER_ROWS, SPEC)
    sidecar = sidecar_path(path).read_bytes()
    path.unlink()
    sidecar_path(path).unlink()
    write_shard(folder, ROWS, SPEC)
    sidecar_path(path).write_bytes(sidecar)
    before = listing(folder)
    with begin(folder) as writer:
        writer.publish()
    assert listing(folder) == before
    with pytest.raises(ShardCorruptError):
        verify_shard(path)


def test_a_file_that_the_system_does_not_give_out_is_not_taken_for_damage(folder):
    path = folder / NAMES[1]
    path.symlink_to(path)
    with pytest.raises(ShardError, match=r"shard-000000.parquet: cannot be read: ") as caught:
        adopt(path, FOOTER, 8)
    assert not isinstance(caught.value, ShardCorruptError)
    assert os.listdir(folder) == NAMES[1:]


def test_a_full_disk_while_a_sidecar_is_made_is_one_line_and_leaves_nothing(folder, monkeypatch):
    path = orphan(folder)

    def full(self, path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Sidecar, "write", full)
    with pytest.raises(RunError, match=r"shard-000000.json: cannot be written: No space left"):
        adopt(path, FOOTER, 8)
    assert os.listdir(folder) == NAMES[1:]
