"""The page of `train-student report`: what is on it, of which runs, and how it stays small."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import vl_convert
from click.testing import CliRunner

import cli
from student_train.evaluation.definitions import DEFINITIONS
from tests.report_page import Page, make_run
from tests.tiny_teacher import ROOT

HOSTILE = '</script><img src=x onerror="alert(1)">&amp;<!--'
DASH = "\N{EN DASH}"


@pytest.fixture(scope="module", autouse=True)
def bundled_once() -> Iterator[None]:
    """vl-convert takes seconds to bundle the same script each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "javascript_bundle", cache(vl_convert.javascript_bundle))
        yield


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
        "KL to the kept entries, on the same shards, nats",
        "Top-1 agreement with the teacher",
        "Loss, (1 - alpha) lm + alpha kd",
        "Cross-entropy of the labels (lm), nats",
        "Distillation loss (kd)",
        "Alpha",
        "Learning rate",
        "Norm of the gradient",
        "Tokens/s",
        "Waiting for data, part of a step",
        "Peak memory of the process, GiB",
    ]
    for title in page.charts:
        assert sorted(page.curves(title)) == [0, 1], title
    for run, steps in ((0, 12), (1, 8)):
        points = page.values("Loss, (1 - alpha) lm + alpha kd", run)
        expected = [(100 * step, 4 + 6 / step) for step in range(1, steps + 1)]
        assert points == [pytest.approx(point, rel=1e-5) for point in expected]
        points = page.values("Peak memory of the process, GiB", run)
        assert points == [(100 * step, step / 4) for step in range(1, steps + 1)]
    assert (
        page.charts["KL to the teacher, lower bound, nats"]["description"]
        == (DEFINITIONS["kl_bound"])
    )
    assert DEFINITIONS["kl_bound"] in page.text


def test_axes_and_tooltips_have_the_format_of_their_figure(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run"), out=tmp_path / "report.html")
    for title, ticks, value, domain in (
        ("Top-1 agreement with the teacher", "~%", ".1%", (0.036, 0.124)),
        ("Learning rate", "~e", ".2e", (0, 1.05e-3)),
        ("Alpha", None, ".4g", (0, 1)),
        ("Tokens/s", None, ",.0f", (0, 210)),
        ("Waiting for data, part of a step", "~%", ".1%", (0, 0.105)),
        ("Peak memory of the process, GiB", None, ".2f", (0, 3.15)),
        ("Norm of the gradient", None, ".4f", (0.95, 1.05)),
    ):
        encoding = page.layer(title, "circle")
        assert encoding["y"]["axis"].get("format") == ticks, title
        assert {each["field"]: each.get("format") for each in encoding["tooltip"]} == {
            "run": None, "tokens": ",.0f", "mean": value, "lowest": value, "highest": value,
        }, title  # fmt: skip
        assert page.y_domain(title) == pytest.approx(domain), title
        assert encoding["x"]["scale"]["domain"] == [0, 1212]


def test_validation_lies_at_the_tokens_trained_on_and_not_at_its_own(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run"), out=tmp_path / "report.html")
    assert [x for x, _ in page.values("Top-1 agreement with the teacher")] == [400, 800, 1200]


def test_the_teachers_cross_entropy_is_a_line_unless_it_squeezes_the_curves(tmp_path: Path) -> None:
    title = "Cross-entropy of the labels, nats"
    page = report(make_run(tmp_path / "run"), out=tmp_path / "report.html")
    assert page.charts[title]["datasets"]["teachers"] == [{"value": 3.25}]
    assert page.layer(title, "rule")["y"]["field"] == "value"
    low, high = 4 + 5 / 12, 5.25
    room = (high - low) / 20
    assert page.y_domain(title) == pytest.approx((low - room, high + room))
    assert page.rows["Teacher's cross-entropy, nats"] == ["3.2500"]
    assert "teacher: 3.250" in page.text
    near = make_run(tmp_path / "near", teacher=4.0)
    page = report(tmp_path / "run", near, out=tmp_path / "report.html")
    assert page.charts[title]["datasets"]["teachers"] == [{"value": 3.25}, {"value": 4.0}]
    room = (high - 4.0) / 20
    assert page.y_domain(title) == pytest.approx((4.0 - room, high + room))


def test_figures_and_settings_of_runs_stand_side_by_side(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", seed=3)
    second = make_run(tmp_path / "second", alpha=0.5, speed=False, seed=3)
    page = report(first, second, out=tmp_path / "report.html")
    assert page.rows["State"] == ["finished", "finished"]
    assert page.rows["alpha"] == ["0.9", "0.5"]
    assert page.rows["Epochs"] == ["1.50, 0.25"] * 2
    assert page.rows["Parameters"] == ["7,357,824"] * 2
    assert page.rows["Cross-entropy of the labels, nats"] == ["4.4167", "4.4167"]
    assert page.rows["Time of steps"] == ["6 s", "1 min 39 s"]
    assert page.rows["Tokens/s"] == ["200", "12"]
    assert page.rows["Waiting for data, part of a step"] == ["10.0%", DASH]
    assert page.rows["dataset.spec.tokens_sha256"] == ["ab" * 32] * 2
    assert page.rows["evaluation_dataset"] == ["the same dataset"] * 2
    assert page.marked == ["alpha", "alpha"]  # at the top and among all; not seed, and not out
    assert next(iter(list(page.rows)[1:])) == "alpha"


def test_students_from_files_have_their_path_and_their_hash(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, student=f"{name}/config.json") for name in ("wide", "deep")]
    for number, folder in enumerate(runs):
        content = json.loads((folder / "run.json").read_text())
        content |= {"student": f"{number}" * 64, "teacher": None}
        (folder / "run.json").write_text(json.dumps(content))
    page = report(*runs, out=tmp_path / "report.html")
    assert page.rows["student"] == ["wide/config.json", "deep/config.json"]
    assert page.rows["student_sha256"] == ["0" * 64, "1" * 64]
    assert "teacher_sha256" not in page.rows


def test_another_number_of_datasets_is_marked_among_the_settings_alone(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    content = json.loads((second / "run.json").read_text())
    content["dataset_2"] = {"spec": {"sequence_length": 16}}
    (second / "run.json").write_text(json.dumps(content))
    page = report(first, second, out=tmp_path / "report.html")
    assert page.rows["dataset_2.spec.sequence_length"] == [DASH, "16"]
    assert page.marked == ["dataset_2.spec.sequence_length"]


def test_a_run_on_a_gpu_has_its_utilisation_and_memory(tmp_path: Path) -> None:
    page = report(
        make_run(tmp_path / "cpu"), make_run(tmp_path / "gpu", gpu=True), out=tmp_path / "r.html"
    )
    assert page.rows["Model FLOP utilisation"] == [DASH, "25.0%"]
    assert page.rows["Peak memory of the GPU, GiB"] == [DASH, "3.00"]
    assert page.rows["Bits per byte"] == ["2.0833"] * 2
    assert page.rows["Calibration error"] == ["0.0083"] * 2
    for title, value in (("Model FLOP utilisation", 0.25), ("Peak memory of the GPU, GiB", 3.0)):
        assert sorted(page.curves(title)) == [1]
        assert page.values(title, 1)[-1] == (1200, value)


def test_a_run_that_is_going_on_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False, tokens=4800)
    for name in ("metrics.jsonl", "speed.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 13, "ki')
    begun = make_run(tmp_path / "begun", steps=0, finished=False, tokens=4800)
    (begun / "metrics.jsonl").unlink()
    page = report(run, begun, out=tmp_path / "report.html")
    state, begun_state = page.rows["State"]
    assert re.fullmatch(r"not finished, last step \d{4}-\d\d-\d\d \d\d:\d\d UTC", state)
    assert begun_state == "no step yet"
    assert page.rows["Steps"] == ["12", "0"]
    assert page.rows["Tokens"] == ["1,200 of 4,800", "0 of 4,800"]
    assert len(page.values("Learning rate")) == 12
    assert "Runs: 2, not finished: 2." in page.text
    page = report(begun, out=tmp_path / "report.html")
    assert page.charts == {}
    assert "No step has been recorded yet." in page.text


def test_runs_without_some_figures_have_the_others(tmp_path: Path) -> None:
    labels = make_run(tmp_path / "labels", alpha=0.0, speed=False, kl=())
    sampled = make_run(tmp_path / "sampled", kl=("kl_unbiased",))
    page = report(labels, sampled, out=tmp_path / "report.html")
    assert sorted(page.curves("Alpha")) == [0, 1]
    for title in (
        "KL to the teacher, unbiased estimate, nats",
        "Distillation loss (kd)",
        "Tokens/s",
    ):
        assert sorted(page.curves(title)) == [1], title
    assert not [title for title in page.charts if title.startswith("KL to the kept entries")]


def test_what_comes_from_files_is_text_and_nothing_else(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / HOSTILE.replace("/", ""), student=HOSTILE, **{HOSTILE: {"<b>": HOSTILE}}
    )
    (run / "tasks.json").write_text(
        json.dumps({"tasks": {HOSTILE: None}, "results": {HOSTILE: {f"{HOSTILE},none": 0.5}}})
    )
    page = report(run, out=tmp_path / "report.html")
    assert run.name in page.text
    assert page.rows["student"] == [HOSTILE]
    assert page.rows[f"{HOSTILE}.<b>"] == [HOSTILE]
    assert page.rows[f"{HOSTILE} {HOSTILE}"] == ["0.5000"]
    names = [tag for tag, _ in page.tags]
    assert not {"img", "b", "link", "iframe"} & set(names)
    assert names.count("script") == 2 + len(page.charts)


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run"), out=tmp_path / "report.html")
    assert not [attrs for _, attrs in page.tags if {"src", "href"} & set(attrs)]
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    html = (tmp_path / "report.html").read_text()
    assert "ast: true" in html  # without it Vega would need unsafe-eval
    for spec in page.charts.values():
        assert all("url" not in layer["data"] for layer in spec["layer"])
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    assert re.findall(r"url\(|@import", style[1]) == []
    assert "color-scheme: light dark" in style[1]
    classes = {str(attrs["class"]) for _, attrs in page.tags if "class" in attrs}
    assert classes <= set(re.findall(r"\.([a-z][\w-]*)", style[1]))


def test_many_runs_are_told_apart_by_dashes_when_colours_come_again(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run-{i}", steps=4) for i in range(8)]
    page = report(*runs, out=tmp_path / "report.html")
    assert sorted(page.curves("Alpha")) == list(range(8))
    scale = page.layer("Alpha", "line")["strokeDash"]["scale"]
    assert scale["domain"] == list(range(8))
    assert scale["range"][:8] == [[1, 0]] * 6 + [[5, 3]] * 2
    styles = [str(attrs["style"]) for tag, attrs in page.tags if tag == "i"]
    assert styles[0] == "border-top-style: solid; color: var(--c0)"
    assert styles[6] == "border-top-style: dashed; color: var(--c0)"


def test_runs_of_one_name_are_named_by_more_of_their_path(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "out", steps=4) for name in ("a", "b")]
    page = report(*runs, out=tmp_path / "report.html")
    assert page.rows[""] == ["a/out", "b/out"]


def test_a_long_run_has_a_small_page_that_still_shows_its_spikes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=0, tokens=100 * 20_000)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 20_001):
            loss = 3 + math.sin(step) / 10 + (50 if step == 12_345 else 0)
            line = {"step": step, "kind": "train", "tokens": 100 * step, "loss": loss, "lm": 2.0}
            file.write(json.dumps(line) + "\n")
    page = report(run, out=tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 1_100_000
    (curve,) = page.curves("Loss, (1 - alpha) lm + alpha kd").values()
    assert len(curve["mean"]) == 400
    assert max(curve["mean"]) < 3.1 + 50 / 50
    spike = 3 + math.sin(12_345) / 10 + 50
    assert max(curve["highest"]) == pytest.approx(spike, rel=1e-5)
    assert curve["highest"].index(max(curve["highest"])) == 12_344 // 50
    encoding = page.layer("Loss, (1 - alpha) lm + alpha kd", "area")
    assert (encoding["y"]["field"], encoding["y2"]["field"]) == ("lowest", "highest")
    (curve,) = page.curves("Cross-entropy of the labels (lm), nats").values()
    assert set(curve["mean"]) == set(curve["lowest"]) == set(curve["highest"]) == {2.0}
    assert "shaded from lowest to highest" in page.text


def test_the_beginning_of_a_loss_does_not_squeeze_its_end(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run", steps=200), out=tmp_path / "report.html")
    title = "Loss, (1 - alpha) lm + alpha kd"
    low, high = 4 + 6 / 200, 4 + 6 / 11
    room = (high - low) / 20
    assert page.y_domain(title) == pytest.approx((low - room, high + room), rel=1e-4)
    assert page.values(title)[0] == (100, 10)  # drawn, and cut off
    assert all(layer["mark"]["clip"] for layer in page.charts[title]["layer"])


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
        '{"step": 1, "kind": "train", "tokens": 1' + "0" * 400 + "}",
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
    figures = f'"loss": NaN, "lm": null, "kd": 1{"0" * 400}'
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 13, "kind": "train", "tokens": 1300, {figures}}}\n')
    page = report(run, out=tmp_path / "report.html")
    assert len(page.values("Loss, (1 - alpha) lm + alpha kd")) == 12
    assert len(page.values("Distillation loss (kd)")) == 12
    assert page.rows["Steps"] == ["13"]


def test_odd_values_in_the_summary_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", speed=False)
    summary = {"seconds": "many", "epochs": [None, 1.5], "parameters": True}
    (run / "summary.json").write_text(json.dumps(summary))
    page = report(run, out=tmp_path / "report.html")
    assert page.rows["Epochs"] == ["1.50"]
    assert not {"Time of steps", "Tokens/s", "Parameters"} & set(page.rows)


@pytest.mark.parametrize("module", ["altair", "jinja2", "vl_convert"])
def test_without_the_extra_its_name_is_said(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "student_train.report.page", raising=False)
    line = refusal(run, "--out", tmp_path / "report.html")
    assert line.startswith("train-student report: missing packages, ")
    assert "the extra 'report' of logitshards" in line
    assert not (tmp_path / "report.html").exists()
    monkeypatch.undo()
    importlib.import_module("student_train.report.page")


def test_the_report_needs_no_torch_and_training_needs_no_altair(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "report.html"
    code = (
        "import sys, cli\n"
        "import student_train.run, student_train.loop\n"
        "print([name for name in ('altair', 'vl_convert') if name in sys.modules])"
    )
    report_code = (
        "import sys, cli\n"
        f"try: cli.main(['train-student', 'report', {str(run)!r}, '--out', {str(out)!r}])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])"
    )
    for words, lines in ((report_code, [f"{out}: 1 run", "[]"]), (code, ["[]"])):
        result = subprocess.run(
            [sys.executable, "-c", words], capture_output=True, text=True, check=True, cwd=ROOT
        )
        assert result.stdout.splitlines() == lines


def test_train_student_itself_is_called_as_before() -> None:
    result = CliRunner().invoke(cli.train_student, ["--help"])
    assert result.exit_code == 0
    assert re.search(r"Commands:\n  report +Show how runs went", result.output)
    result = CliRunner().invoke(cli.train_student, ["--student", "demo", "--out", "report"])
    assert result.exit_code == 2
    assert result.output == "train-student: --shards: missing\n"
    result = CliRunner().invoke(cli.train_student, ["reports"])
    assert result.exit_code == 2
