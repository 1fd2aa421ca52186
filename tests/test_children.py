"""Children of a killed command: they hold no lock, and those of an engine end with it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import InputError
from shards.process.folder_lock import folder_lock

ROOT = Path(__file__).parent.parent
WAIT_S = 60


def _start(program: str, *arguments: str) -> tuple[subprocess.Popen[str], int]:
    """A program that prints the id of a child of its own, and that id."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def ends(pid: int, within_s: float = WAIT_S) -> bool:
    """Whether any process, also one that has been adopted, ends in this time."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watched], [], [], within_s)[0])
    finally:
        os.close(watched)


LOCKING = """
import os, sys, time
from pathlib import Path
from shards.process.folder_lock import folder_lock
try:
    with folder_lock(Path(sys.argv[1]), "test"):
        if not os.fork():
            print(os.getpid(), flush=True)  # by now it has dropped the lock
        time.sleep(600)
except BaseException:
    os._exit(1)
"""


def test_a_child_that_outlives_its_killed_parent_does_not_hold_the_lock(tmp_path: Path) -> None:
    parent, child = _start(LOCKING, str(tmp_path))
    try:
        with (
            pytest.raises(InputError, match="another test is writing"),
            folder_lock(tmp_path, "test"),
        ):
            pass
        _kill(parent)
        with folder_lock(tmp_path, "test"):
            assert not ends(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_that_leaves_the_block_leaves_the_lock_to_its_parent(tmp_path: Path) -> None:
    with folder_lock(tmp_path, "test"):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        again = "import sys; from pathlib import Path\n" \
                "from shards.process.folder_lock import folder_lock\n" \
                "with folder_lock(Path(sys.argv[1]), 'test'): pass"  # fmt: skip
        command = [sys.executable, "-c", again, str(tmp_path)]
        held = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert "another test is writing" in held.stderr
    with folder_lock(tmp_path, "test"):
        pass


FORKING = """
import os, time
from shards.process.children import engine_children
from shards.process.stop_signals import stopped_by_signals
with stopped_by_signals():
    with engine_children():
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            grandchild = os.fork()
            if grandchild:
                os.write(writable, str(grandchild).encode())
            time.sleep(600)
    print(os.read(readable, 99).decode(), flush=True)
    time.sleep(600)
"""

SPAWNING = """
import multiprocessing, os, sys, time
from shards.process.children import become_engine_child, engine_children

def child(pipe):
    become_engine_child()
    grandchild = os.fork()
    if grandchild:
        pipe.send(grandchild)
    time.sleep(600)

if __name__ == "__main__":
    here, there = multiprocessing.Pipe()
    with engine_children():
        multiprocessing.get_context("spawn").Process(target=child, args=(there,)).start()
    print(here.recv(), flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=[FORKING, SPAWNING], ids=["fork", "spawn"])
def engine_program(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A program that starts a process and prints the id of a child of that."""
    script = tmp_path / "program.py"  # a file, which a spawned process can import
    script.write_text(request.param, encoding="utf-8")
    return f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n" \
           f"runpy.run_path({str(script)!r}, run_name='__main__')"  # fmt: skip


def test_processes_of_an_engine_end_with_the_one_that_started_them(engine_program: str) -> None:
    parent, grandchild = _start(engine_program)
    try:
        assert not ends(grandchild, 0)
    finally:
        _kill(parent)
    assert ends(grandchild)


def test_signals_of_a_scheduler_are_for_the_command_alone(engine_program: str) -> None:
    parent, grandchild = _start(engine_program)
    try:
        status = Path(f"/proc/{grandchild}/status").read_text(encoding="utf-8")
        masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Sig"))
        ignored, caught = (int(masks[name], 16) for name in ("SigIgn", "SigCgt"))
        assert ignored >> (signal.SIGUSR1 - 1) & 1
        assert not caught >> (signal.SIGTERM - 1) & 1
    finally:
        _kill(parent)


def test_a_child_whose_parent_has_ended_already_ends_too() -> None:
    program = "from shards.process.children import _end_with\n_end_with(1 << 22)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert result.returncode == -signal.SIGKILL


def test_the_process_that_starts_an_engine_stays_what_it_is() -> None:
    from shards.process.children import become_engine_child, engine_children

    before = signal.getsignal(signal.SIGUSR1)
    with engine_children():
        become_engine_child()
        assert signal.getsignal(signal.SIGUSR1) is before
    assert not [name for name in os.environ if name.startswith("LOGITSHARDS")]
