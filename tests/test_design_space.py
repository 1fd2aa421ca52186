"""The grid of experiments/design_space on a tiny scale: its rows, what it skips, its pages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.design_space import grid, results
from experiments.design_space.grid import SCALES, Cell

ROOT = Path(__file__).parent.parent
SMOKE = SCALES["smoke"]


def run_grid(folder: Path, *words: str) -> str:
    """What the command prints."""
    command = [sys.executable, str(ROOT / "experiments" / "design_space" / "run.py")]
    options = ["--work", str(folder / "work"), "--results", str(folder / "results.csv")]
    options += ["--scale", "smoke", "--questions", "1", *words]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid after its first two cells: the full distributions, and labels alone."""
    folder = tmp_path_factory.mktemp("grid")
    run_grid(folder, "--runs", "2")
    return folder


def test_two_cells_make_two_rows_by_their_settings(folder: Path) -> None:
    full, plain = results.read(folder / "results.csv")
    for row, target in ((full, "full"), (plain, "LM")):
        assert row["cell"] == target
        assert row["settings"] == Cell(question=1, target=target).hash(SMOKE)
        assert (row["seed"], row["scale"], row["tokens"]) == ("0", "smoke", "2048")
    assert float(full["entries_per_token"]) == SMOKE.vocab_size
    assert float(plain["entries_per_token"]) == 0
    assert float(full["bytes_per_token"]) > 50 > float(plain["bytes_per_token"]) > 1
    assert json.loads(full["train"])["alpha"] == 1
    assert json.loads(plain["train"])["alpha"] == 0
    assert json.loads(plain["dump"])["keep"] == "tokens"


def test_rows_hold_what_the_trainer_measured(folder: Path) -> None:
    for row in results.read(folder / "results.csv"):
        name = f"{row['settings']}-{row['text']}-{row['seed']}"
        lines = (folder / "work" / "runs" / name / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert float(row["cross_entropy"]) == pytest.approx(last["cross_entropy"], rel=1e-5)
        # The evaluation dataset keeps everything, so this is the whole divergence.
        assert float(row["kl"]) == pytest.approx(last["kl_kept"], rel=1e-4)


def test_the_same_command_skips_rows_and_makes_a_missing_one_from_its_run(folder: Path) -> None:
    file = folder / "results.csv"
    before = file.read_text()
    head, first, second = before.splitlines(keepends=True)
    file.write_text(head + second)
    printed = run_grid(folder, "--runs", "1")
    assert file.read_text() == head + second + first
    assert [line for line in printed.splitlines() if line.startswith("$ dump-logits")] == []


def test_a_torn_line_is_no_row_and_gives_way_to_the_next(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    row = dict.fromkeys(results.COLUMNS, "x")
    results.append(file, row)
    whole = file.read_bytes()
    for torn in (whole + b"a,b", whole[:30]):
        file.write_bytes(torn)
        assert len(results.read(file)) == (1 if torn.startswith(whole) else 0)
        results.append(file, row)
        assert file.read_bytes() == (whole + whole.splitlines(True)[1])[: len(file.read_bytes())]
        assert results.read(file)[-1] == row


def test_a_question_is_done_seed_by_seed_and_cells_differ_in_settings() -> None:
    order = list(grid.runs([1]))
    size = len(order) // len(grid.SEEDS)
    assert [seed for _, seed in order] == [seed for seed in grid.SEEDS for _ in range(size)]
    assert {cell.target for cell, _ in order[:size]} == set(grid.TARGETS)
    laptop = SCALES["laptop"]
    hashes = [cell.hash(laptop) for cell in grid.cells()]
    assert len(set(hashes)) == len({cell.name for cell in grid.cells()})
    assert len(hashes) * len(grid.SEEDS) > 150
