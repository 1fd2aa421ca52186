"""The page of `train-student report`: what is on it, of which runs, and how it stays small."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from student_train.report.style import NUM_COLOURS
from tests.report_page import Page, make_run
from tests.tiny_teacher import ROOT

HOSTILE = '</script><img src=x onerror="alert(1)">&amp;'


def report(*runs: Path, out: Path) -> Page:
    result = CliRunner().invoke(cli.train_student, ["report", *map(str, runs), "--out", str(out)])
    assert result.exit_code == 0, result.output
    return Page(out.read_text(encoding="utf-8"))


def refusal(*words: object) -> str:
    """The one line that a command ends in with exit code 2."""
    result = CliRunner().invoke(cli.train_student, ["report", *map(str, words)])
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    return line


def test_the_page_has_a_curve_of_every_figure_and_run(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    second = make_run(tmp_path / "second", steps=8, alpha=0.5)
    page = report(first, second, out=tmp_path / "report.html")
    assert list(page.charts) == [
        "Cross-entropy of the labels, nats",
        "KL to the teacher, lower bound, nats",
        "KL to the kept entries, nats",
        "Top-1 agreement with the teacher",
        "Loss",
        "Cross-entropy of the labels (lm), nats",
        "Distillation loss (kd)",
        "Alpha",
        "Learning rate",
        "Norm of the gradient",
        "Tokens/s",
        "Waiting for data",
        "Peak memory of the process, GiB",
    ]
    for title, chart in page.charts.items():
        assert sorted(chart["curves"]) == [0, 1], title
    for run, steps in ((0, 12), (1, 8)):
        expected = [(100 * step, 4 + 6 / step) for step in range(1, steps + 1)]
        for found, point in zip(page.values("Loss", run), expected, strict=True):
            assert found == pytest.approx(point, rel=1e-3)
        expected = [(100 * step, step / 4) for step in range(1, steps + 1)]
        for found, point in zip(
            page.values("Peak memory of the process, GiB", run), expected, strict=True
        ):
            assert found == pytest.approx(point, rel=1e-2, abs=0.01)


def test_validation_lies_at_the_tokens_trained_on_and_not_at_its_own(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run"), out=tmp_path / "report.html")
    tokens = [x for x, _ in page.values("Top-1 agreement with the teacher")]
    assert tokens == pytest.approx([400, 800, 1200], rel=1e-3)
    assert "teacher: 3.250" in page.text


def test_figures_and_settings_of_runs_stand_side_by_side(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", seed=3)
    second = make_run(tmp_path / "second", alpha=0.5, speed=False, seed=3)
    page = report(first, second, out=tmp_path / "report.html")
    assert page.rows["state"] == ["finished", "finished"]
    assert page.rows["alpha"] == ["0.9", "0.5"]
    assert page.rows["validation cross-entropy, nats"] == ["4.4167", "4.4167"]
    assert page.rows["time of training steps"] == ["6 s", "1 min 39 s"]
    assert page.rows["tokens/s"] == ["200", "12"]
    assert page.rows["waiting for data, mean"] == ["10.0%", "\N{EN DASH}"]
    assert page.rows["dataset.spec.tokens_sha256"] == ["abababababab..."] * 2
    assert page.rows["evaluation_dataset"] == ["the same dataset"] * 2
    marked = re.findall(
        r'<tr class="differs"><th scope="row">(.*?)</th>',
        (tmp_path / "report.html").read_text(),
    )
    assert marked == ["alpha", "alpha"]  # at the top and among all; not seed, and not out


def test_a_run_on_a_gpu_has_its_utilisation_and_memory(tmp_path: Path) -> None:
    page = report(
        make_run(tmp_path / "cpu"), make_run(tmp_path / "gpu", gpu=True), out=tmp_path / "r.html"
    )
    dash = "\N{EN DASH}"
    assert page.rows["model FLOP utilisation, mean"] == [dash, "25.0%"]
    assert page.rows["peak memory of the GPU"] == [dash, "3.00 GiB"]
    assert page.rows["bits per byte"] == ["2.0833"] * 2
    assert page.rows["calibration error"] == ["0.0083"] * 2
    for title, value in (("Model FLOP utilisation", 0.25), ("Peak memory of the GPU, GiB", 3.0)):
        assert sorted(page.charts[title]["curves"]) == [1]
        (*_, (tokens, last)) = page.values(title, 1)
        assert (tokens, last) == pytest.approx((1200, value), rel=1e-3)


def test_a_run_that_is_going_on_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False, tokens=4800)
    for name in ("metrics.jsonl", "speed.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 13, "ki')
    begun = make_run(tmp_path / "begun", steps=0, finished=False, tokens=4800)
    (begun / "metrics.jsonl").unlink()
    page = report(run, begun, out=tmp_path / "report.html")
    assert page.rows["state"] == ["not finished", "no step yet"]
    assert page.rows["tokens"] == ["1.2k of 4.8k (25%)", "0 of 4.8k (0%)"]
    assert len(page.values("Loss")) == 12
    assert "2 runs, 2 not finished" in page.text
    page = report(begun, out=tmp_path / "report.html")
    assert page.charts == {}
    assert "No step has been recorded yet." in page.text


def test_runs_without_some_figures_have_the_others(tmp_path: Path) -> None:
    labels = make_run(tmp_path / "labels", alpha=0.0, speed=False, kl=())
    sampled = make_run(tmp_path / "sampled", kl=("kl_unbiased",))
    page = report(labels, sampled, out=tmp_path / "report.html")
    assert sorted(page.charts["Loss"]["curves"]) == [0, 1]
    for title in (
        "KL to the teacher, unbiased estimate, nats",
        "Distillation loss (kd)",
        "Tokens/s",
    ):
        assert sorted(page.charts[title]["curves"]) == [1], title
    assert "KL to the kept entries, nats" not in page.charts


def test_what_comes_from_files_is_text_and_nothing_else(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / HOSTILE.replace("/", ""), student=HOSTILE, **{HOSTILE: {"<b>": HOSTILE}}
    )
    page = report(run, out=tmp_path / "report.html")
    assert HOSTILE in page.text
    assert page.rows["student"] == [HOSTILE]
    assert page.rows[f"{HOSTILE}.<b>"] == [HOSTILE]
    names = [tag for tag, _ in page.tags]
    assert not {"img", "b", "link", "iframe"} & set(names)
    assert names.count("script") == 1


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run"), out=tmp_path / "report.html")
    assert not [attrs for _, attrs in page.tags if {"src", "href"} & set(attrs)]
    (policy,) = [a for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert str(policy["content"]).startswith("default-src 'none';")
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "report.html").read_text(), re.DOTALL)
    assert style is not None
    assert "prefers-color-scheme: dark" in style[1]
    assert set(re.findall(r"url\((.*?)\)|@import", style[1])) == set()
    classes = {str(attrs["class"]) for _, attrs in page.tags if "class" in attrs}
    defined = set(re.findall(r"\.([a-z][\w-]*)", style[1]))
    assert {name for each in classes for name in each.split()} <= defined | {"tick", "axis"}


def test_many_runs_are_told_apart_by_dashes_when_colours_come_again(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run-{i}", steps=4) for i in range(NUM_COLOURS + 2)]
    page = report(*runs, out=tmp_path / "report.html")
    assert len(page.charts["Loss"]["curves"]) == NUM_COLOURS + 2
    html = (tmp_path / "report.html").read_text()
    assert f".curve.r{NUM_COLOURS} {{ stroke-dasharray" in html
    assert f".curve.r{NUM_COLOURS - 1} {{" not in html


def test_runs_of_one_name_are_named_by_more_of_their_path(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "out", steps=4) for name in ("a", "b")]
    page = report(*runs, out=tmp_path / "report.html")
    assert "a/out" in page.text
    assert "b/out" in page.text


def test_a_long_run_has_a_small_page_that_still_shows_its_spikes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=0, tokens=100 * 20_000)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 20_001):
            loss = 3 + math.sin(step) / 10 + (50 if step == 12_345 else 0)
            line = {"step": step, "kind": "train", "tokens": 100 * step, "loss": loss, "lm": 2.0}
            file.write(json.dumps(line) + "\n")
    page = report(run, out=tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 60_000
    points = page.values("Loss")
    assert 200 <= len(points) <= 400
    assert max(y for _, y in points) < 4.1  # 50 among the 64 steps or more of a bucket
    assert page.charts["Loss"]["bands"] == 1
    assert page.charts["Cross-entropy of the labels (lm), nats"]["bands"] == 0
    assert len(page.values("Cross-entropy of the labels (lm), nats")) == 2  # level in between
    assert "shaded from lowest to highest" in page.text


def test_the_beginning_of_a_loss_does_not_squeeze_its_end(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run", steps=200), out=tmp_path / "report.html")
    assert float(page.charts["Loss"]["axes"]["data-high"]) < 5
    assert page.values("Loss")[0] == pytest.approx((100, 10), rel=0.02)  # drawn, and cut off
    assert "the highest, 10.0, is cut off" in page.text


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    out = tmp_path / "report.html"
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (empty, tmp_path / "nothing", run / "run.json"):
        line = refusal(path, "--out", out)
        assert line.startswith(f"train-student report: {path}: not the folder of a run")
    assert "given twice" in refusal(run, tmp_path / "." / "run", "--out", out)
    assert "a folder that exists" in refusal(run, "--out", tmp_path / "nowhere" / "report.html")
    assert "a folder that exists" in refusal(run, "--out", empty)
    assert not out.exists()
    result = CliRunner().invoke(cli.train_student, ["report", "--out", str(out)])
    assert result.exit_code == 2
    assert result.output == "train-student report: RUN: missing\n"


@pytest.mark.parametrize(
    "line",
    [
        "nonsense", "[1]", "3", '{"step": 1}', '{"kind": "train"}',
        '{"step": "1", "kind": "train", "tokens": 1}', '{"step": 1, "kind": "train"}',
        '{"step": 1, "kind": "train", "tokens": NaN}',
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_read_is_named(line: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    number = 12 + 3 + 1
    assert f"metrics.jsonl:{number}: not a line of figures" in refusal(run)


def test_a_figure_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "kind": "train", "tokens": 1300, "loss": NaN, "lm": null}\n')
    page = report(run, out=tmp_path / "report.html")
    assert len(page.values("Loss")) == 12
    assert page.rows["steps"] == ["13"]


def test_the_report_needs_no_torch(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "report.html"
    code = (
        "import sys, cli\n"
        f"try: cli.main(['train-student', 'report', {str(run)!r}, '--out', {str(out)!r}])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.splitlines() == [f"{out}: 1 run", "[]"]


def test_train_student_itself_is_called_as_before() -> None:
    result = CliRunner().invoke(cli.train_student, ["--help"])
    assert result.exit_code == 0
    assert re.search(r"Commands:\n  report +Show how runs went", result.output)
    result = CliRunner().invoke(cli.train_student, ["--student", "demo", "--out", "report"])
    assert result.exit_code == 2
    assert result.output == "train-student: --shards: missing\n"
    result = CliRunner().invoke(cli.train_student, ["reports"])
    assert result.exit_code == 2
