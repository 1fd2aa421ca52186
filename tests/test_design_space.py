"""The grid of experiments/design_space on a tiny scale: its rows, what it skips, its pages."""

from __future__ import annotations

import json
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.design_space import draw, grid, results, text
from experiments.design_space.grid import Cell
from experiments.design_space.scales import SCALES, TARGETS

ROOT = Path(__file__).parent.parent
SMOKE = SCALES["smoke"]


def command(folder: Path, *words: str) -> list[str]:
    """The command line of a tiny grid."""
    script = ROOT / "experiments" / "design_space" / "run.py"
    options = ["--work", str(folder / "work"), "--results", str(folder / "results.csv")]
    return [sys.executable, str(script), *options, "--scale", "smoke", *words]


def run_grid(folder: Path, *words: str) -> str:
    """What the command prints."""
    done = subprocess.run(command(folder, *words), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid after its first two cells, the labels alone and sampled targets.

    A signal stopped it while it trained the teacher.
    """
    folder = tmp_path_factory.mktemp("grid")
    with subprocess.Popen(
        command(folder, "--jobs", "2"), stdout=subprocess.PIPE, text=True
    ) as stopped:
        assert stopped.stdout is not None
        for line in stopped.stdout:
            if line.startswith("$ train-student"):
                assert (folder / "work" / "pid").read_text() == f"{stopped.pid}\n"
                stopped.send_signal(signal.SIGTERM)
                break
        assert stopped.wait() == 128 + signal.SIGTERM
    assert results.read(folder / "results.csv") == []
    run_grid(folder, "--runs", "2")
    return folder


def test_two_cells_make_two_rows_by_their_settings(folder: Path) -> None:
    plain, sampled = results.read(folder / "results.csv")
    for row, target in ((plain, "LM"), (sampled, "threshold 0.05")):
        assert row["cell"] == target
        assert row["settings"] == Cell(question=1, target=target).hash(SMOKE)
        assert (row["seed"], row["scale"], row["tokens"]) == ("0", "smoke", "2048")
    assert float(plain["entries_per_token"]) == 0
    assert 1 < float(sampled["entries_per_token"]) < 1 / 0.05 + 1
    assert 1 < float(plain["bytes_per_token"]) < float(sampled["bytes_per_token"])
    assert json.loads(plain["train"])["alpha"] == 0
    assert json.loads(sampled["train"])["alpha"] == 1
    assert json.loads(plain["dump"])["keep"] == "tokens"
    assert json.loads(sampled["dump"])["keep"] == "threshold"
    assert plain["teacher_cross_entropy"] == sampled["teacher_cross_entropy"]  # one evaluation


def test_rows_hold_what_the_trainer_measured(folder: Path) -> None:
    for row in results.read(folder / "results.csv"):
        name = f"{row['settings']}-{row['text']}-{row['seed']}"
        lines = (folder / "work" / "runs" / name / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert float(row["cross_entropy"]) == pytest.approx(last["cross_entropy"], rel=1e-5)
        # The evaluation dataset keeps everything, so this is the whole divergence.
        assert float(row["kl"]) == pytest.approx(last["kl_kept"], rel=1e-4)


@pytest.mark.slow
def test_the_same_command_skips_rows_and_makes_a_missing_one_from_its_run(folder: Path) -> None:
    file = folder / "results.csv"
    before = file.read_text()
    head, first, second = before.splitlines(keepends=True)
    file.write_text(head + second)
    printed = run_grid(folder, "--runs", "1")
    assert file.read_text() == head + second + first
    assert [line for line in printed.splitlines() if line.startswith("$ dump-logits")] == []


@pytest.mark.slow
def test_online_logits_are_those_that_the_teacher_saved_in_its_training(folder: Path) -> None:
    run_grid(folder, "--questions", "7", "--runs", "4", "--jobs", "2")
    rows = [row for row in results.read(folder / "results.csv") if row["question"] == "7"]
    assert {(row["logits"], json.loads(row["train"])["alpha"]) for row in rows} == {
        (logits, alpha) for logits in ("early", "late") for alpha in (1, 0.1)
    }
    saved = {}
    for file in (folder / "work" / "datasets").glob("online-*/manifest.json"):
        manifest = json.loads(file.read_text())
        first = manifest["spec"]["teacher"]["first_step"]
        saved[file.parent.name.split("-")[1]] = (first, manifest["splits"]["train"]["positions"])
    teacher_steps, saved_steps = 16_384 // 512, 4096 // 512
    assert saved == {"early": (1, 4096), "late": (teacher_steps - saved_steps + 1, 4096)}


def test_the_front_of_a_text_is_a_sample_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [f"small {number}" for number in range(300)]
    part = "large " * (text.MAX_CHARACTERS // 6)
    large = [text.BETWEEN.join(f"{part}{number} {i}" for i in range(5)) for number in range(300)]
    monkeypatch.setattr(text, "file_texts", lambda packages: small + large)
    corpus = text.write_corpus(tmp_path / "text", (), 0.5)
    for file in (corpus.train, corpus.held_out):
        kinds = [json.loads(line)["text"].split()[0] for line in file.read_text().splitlines()]
        places = [place / len(kinds) for place, kind in enumerate(kinds) if kind == "small"]
        assert 100 < len(places) < 200
        assert abs(statistics.mean(places) - 0.5) < 0.1  # four standard deviations


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
    assert {cell.target for cell, _ in order[:size]} == set(TARGETS)
    laptop = SCALES["laptop"]
    hashes = [cell.hash(laptop) for cell in grid.cells()]
    assert len(set(hashes)) == len({cell.name for cell in grid.cells()})
    assert len(hashes) * len(grid.SEEDS) > 150


def test_every_question_gets_its_seeds_in_the_order_that_is_declared() -> None:
    order = [(cell.question, seed) for cell, seed in grid.runs()]
    ends = [len(order) - order[::-1].index((question, n - 1)) for question, n in grid.ORDER]
    assert ends == sorted(ends)
    assert len({(cell.name, seed) for cell, seed in grid.runs()}) == len(order)
    assert len(order) == len({cell.name for cell in grid.cells()}) * len(grid.SEEDS)


def test_a_command_ends_when_the_time_is_over() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from experiments.design_space.commands import Commands\n"
         "Commands(0).run('inspect-shards', '--help')"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr == "the time is over; the same command continues\n"


def made_up(entropies: dict[str, list[float]]) -> draw.Rows:
    """Rows of question 1 with these cross-entropies, one per seed."""
    common = dict.fromkeys(results.COLUMNS, "1.5") | {"text": "t", "dump": '{"keep": "draws"}'}
    rows = [
        common
        | {"settings": Cell(question=1, target=target).hash(SMOKE), "seed": f"{seed}"}
        | {"cross_entropy": f"{entropy}"}
        for target, values in entropies.items()
        for seed, entropy in enumerate(values)
    ]
    return draw.Rows(rows, SMOKE)


def test_gains_and_shares_pair_runs_by_seed() -> None:
    rows = made_up({"LM": [4.0, 5.0, 9.0], "full": [3.0, 3.0], "draws 50": [3.5, 3.5]})
    gain = rows.gain(Cell(question=1, target="draws 50"))
    share = rows.share(Cell(question=1, target="draws 50"))
    assert gain is not None
    assert share is not None
    assert tuple(gain) == pytest.approx((1.0, 0.5**0.5))
    assert tuple(share) == pytest.approx(((0.5 + 0.75) / 2, 0.25 / 2**0.5))
    assert gain.text(".2f") == "1.00 ± 0.71"


def test_a_row_of_another_scale_does_not_empty_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = results.read(draw.RESULTS)
    other = found[-1] | {"scale": "smoke", "text": "another"}
    for row in (*found, other):
        results.append(tmp_path / "results.csv", row)
    page = tmp_path / "results.md"
    page.write_text(draw.PAGE.read_text())
    monkeypatch.setattr(
        "sys.argv", ["draw.py", "--results", str(tmp_path / "results.csv"), "--page", str(page)]
    )
    monkeypatch.setattr(draw, "plot", lambda *_: None)
    draw.main()
    assert page.read_text() == draw.PAGE.read_text()


def test_all_rows_of_a_table_are_of_the_same_seeds_and_one_seed_has_no_spread() -> None:
    two = draw.section(made_up({"LM": [4.0, 5.0], "full": [3.0, 3.0]}), 1)
    assert "| full | 1.5 | 1.5 | 3.000 ± 0.000 |" in two
    assert "| LM | - | - | 4.500 ± 0.707 |" in two
    rows = made_up({"LM": [4.0, 5.0], "full": [3.0, 3.0], "draws 50": [3.5]})
    one = draw.section(rows, 1)
    assert "| LM | - | - | 4.000 |" in one
    assert "| full | 1.5 | 1.5 | 3.000 |" in one
    assert "| draws 50 | 1.5 | 1.5 | 3.500 | 1.500 | 1.500 | 1.5000 | 0.500 | 50% | 1 |" in one
    assert "Not run yet: threshold 0.05; " in one
    assert "](images" not in one  # LM and full are the ends of the scale, so there is one point
    assert draw.plot(rows, 1) is None


def test_the_plot_of_targets_has_shares_over_bytes() -> None:
    entropies = {"LM": [4.0, 5.0], "full": [3.0, 3.0], "draws 50": [3.5, 3.5], "k = 1": [4.0, 5.0]}
    content = draw.plot(made_up(entropies), 1).to_dict()
    (points,) = [p for p in content["datasets"].values() if len(p) == 2 and "cell" in p[0]]
    assert {p["cell"]: (p["bytes"], p["value"]) for p in points} == {
        "draws 50": (1.5, 0.625),
        "k = 1": (1.5, 0.0),
    }


@pytest.mark.parametrize(
    ("target", "pages"),
    [
        ("threshold 0.05", ["README.md", "docs/keep-methods.md", "docs/results.md"]),
        ("top-p-k 0.95-100", ["README.md", "docs/keep-methods.md", "docs/results.md"]),
        ("k = 12", ["README.md", "docs/keep-methods.md", "docs/results.md"]),
        *[(f"threshold {t}", ["docs/results.md"]) for t in (0.2, 0.1, 0.02)],
        *[(f"top-p-k {p}-50", ["docs/results.md"]) for p in (0.95, 0.9)],
    ],
)
def test_the_shares_that_pages_quote_are_those_of_the_rows(target: str, pages: list[str]) -> None:
    rows = draw.Rows(results.read(draw.RESULTS), SCALES["laptop"])
    share = rows.share(Cell(question=1, target=target))
    assert share is not None
    assert share.deviation is not None
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert f"{100 * share.mean:.0f} ± {100 * share.deviation:.0f} %" in text


def test_the_gains_that_the_findings_quote_are_in_a_table_below() -> None:
    text = draw.PAGE.read_text(encoding="utf-8")
    findings, tables = text.split("## What to choose")
    quoted = re.findall(r"-?\d\.\d{3}(?: ± \d\.\d{3})?", findings.partition("## Ours")[2])
    assert len(quoted) > 20
    cells = {cell.strip() for line in tables.splitlines() for cell in line.split("|")}
    assert set(quoted) <= cells


def test_the_page_of_results_is_drawn_from_the_rows() -> None:
    page = draw.PAGE.read_text(encoding="utf-8")
    rows = draw.Rows(results.read(draw.RESULTS), SCALES["laptop"])
    assert draw.draw(page, rows) == page, "run experiments/design_space/draw.py"
    for name in re.findall(r"\]\((images/.*?)\)", page):
        assert (draw.PAGE.parent / name).exists()
