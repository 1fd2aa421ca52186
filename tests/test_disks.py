"""Real disks that are full or read-only, however many processes write, in mounts of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shards import inspect
from tests.test_workers import files_of
from tests.tiny_teacher import ROOT, make_tokenizer, write_corpus

OWN_MOUNTS = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
FULL = """
mount -t tmpfs -o size=400k tmpfs "$OUT" && cp -r "$PREPARED/." "$OUT" || exit 99
"$@"
echo "exit code $?"
cp -r "$OUT/." "$KEPT"
mount -o remount,size=64m "$OUT"
"$@"
cp -r "$OUT/." "$FINISHED"
"""
READ_ONLY = """
cp -r "$PREPARED/." "$OUT" && mount --bind "$OUT" "$OUT" || exit 99
mount -o remount,bind,ro "$OUT" || exit 99
"$@"
echo "exit code $?"
cp -r "$OUT/." "$KEPT"
mount -o remount,bind,rw "$OUT"
"$@"
cp -r "$OUT/." "$FINISHED"
"""


def _has_own_mounts() -> bool:
    try:
        return not subprocess.run(
            [*OWN_MOUNTS, "true"], capture_output=True, check=False
        ).returncode
    except FileNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not _has_own_mounts(), reason="needs unshare(1) with mounts")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A dataset of tokens alone, all but its --out."""
    folder = tmp_path_factory.mktemp("corpus")
    make_tokenizer(folder / "tokenizer")
    corpus = write_corpus(folder / "corpus.jsonl", num_documents=60)
    return [
        sys.executable, str(ROOT / "cli.py"), "dump-logits", "--keep", "tokens",
        "--tokenizer", str(folder / "tokenizer"), "--corpus", str(corpus), "--held-out", "0.1",
        "--sequence-length", "32", "--sequences-per-shard", "1",
    ]  # fmt: skip


def _run(words: list[str]) -> None:
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch", [(), ("--rank", "1", "--world-size", "2"), ("--workers", "2")],
    ids=["alone", "rank", "workers"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("script", "reason"), [(FULL, "No space left on device"), (READ_ONLY, "Read-only file system")]
)
def test_a_disk_that_cannot_be_written_is_one_line_and_the_same_command_continues(
    script: str, reason: str, launch: tuple[str, ...], command: list[str], tmp_path: Path
) -> None:
    if "--workers" in launch:
        pytest.importorskip("ray")
    names = ("PREPARED", "OUT", "KEPT", "FINISHED")
    folders = {name: tmp_path / name.lower() for name in names}
    for folder in folders.values():
        folder.mkdir()
    prepared, out = folders["PREPARED"], folders["OUT"]
    _run([*command, "--out", str(prepared), "--max-tokens", "200"])
    before = files_of(prepared)
    assert len(before) > 2
    _run([*command, "--out", str(prepared), "--prepare"])
    result = subprocess.run(
        [*OWN_MOUNTS, script, "sh", *command, "--out", str(out), *launch], cwd=ROOT,
        env=os.environ | {name: str(folder) for name, folder in folders.items()},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "exit code 1\n" in result.stdout, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("dump-logits: "))
    assert reason in line
    assert "Traceback" not in result.stderr
    kept, finished = files_of(folders["KEPT"]), files_of(folders["FINISHED"])
    assert before.items() <= kept.items() <= finished.items()
    assert (len(kept) == len(before)) == (script == READ_ONLY)
    assert inspect.verify(folders["FINISHED"]) == []
