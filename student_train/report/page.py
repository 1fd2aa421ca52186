"""`train-student report`: one page that shows how runs went, side by side.

The page is a single file that loads nothing: style, drawings and script are in it, and its content
security policy forbids the rest, so it can be mailed, archived and opened anywhere. It is made from
the files of the run folders alone, of finished and of unfinished runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from shards.errors import InputError
from shards.files import durable
from student_train.evaluation.definitions import DEFINITIONS
from student_train.report import charts as report_charts
from student_train.report.charts import Chart, draw
from student_train.report.runs import RunRecord, read_runs
from student_train.report.style import SCRIPT, run_styles, style
from student_train.report.tables import figures_table, settings_table

_SECTIONS = (
    (
        "On held-out documents",
        (
            Chart(
                key="validation/cross_entropy",
                title="Cross-entropy of the labels, nats",
                tight=True,
                reference="validation/teacher_cross_entropy",
            ),
            Chart(
                key="validation/kl_bound",
                title="KL to the teacher, lower bound, nats",
                note=DEFINITIONS["kl_bound"],
                tight=True,
            ),
            Chart(
                key="validation/kl_unbiased",
                title="KL to the teacher, unbiased estimate, nats",
                note=DEFINITIONS["kl_unbiased"],
                tight=True,
            ),
            Chart(
                key="validation/kl_kept",
                title="KL to the kept entries, nats",
                note=f"{DEFINITIONS['kl_kept']}; for runs on the same shards",
                tight=True,
            ),
            Chart(
                key="validation/top1_agreement",
                title="Top-1 agreement with the teacher",
                form="percent",
                tight=True,
            ),
        ),
    ),
    (
        "Training",
        (
            Chart(
                key="train/loss",
                title="Loss",
                note="(1 - alpha) lm + alpha kd: to be compared at the same alpha",
                tight=True,
            ),
            Chart(key="train/lm", title="Cross-entropy of the labels (lm), nats", tight=True),
            Chart(key="train/kd", title="Distillation loss (kd)", tight=True),
            Chart(key="train/alpha", title="Alpha", high=1.0),
            Chart(key="train/learning_rate", title="Learning rate", form="scientific"),
            Chart(key="train/gradient_norm", title="Norm of the gradient", tight=True),
        ),
    ),
    (
        "Speed",
        (
            Chart(key="speed/tokens_per_s", title="Tokens/s", form="count"),
            Chart(
                key="speed/flop_utilisation",
                title="Model FLOP utilisation",
                note="of the GPU's peak for bfloat16",
                form="percent",
            ),
            Chart(
                key="speed/data_wait",
                title="Waiting for data",
                note="part of a step's time",
                form="percent",
                high=0.05,
            ),
            Chart(
                key="speed/peak_memory_bytes",
                title="Peak memory of the process, GiB",
                note="resident, with pages of mapped shards",
                form="GiB",
            ),
            Chart(
                key="speed/peak_cuda_memory_bytes",
                title="Peak memory of the GPU, GiB",
                note="allocated by tensors",
                form="GiB",
            ),
        ),
    ),
)


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Write the page of the runs in these folders; a file that is there is replaced.

    InputError for what is no run, cannot be read, or cannot be written to.
    """
    if not out.parent.is_dir() or out.is_dir():
        raise InputError(f"--out {out}: expected the name of a file in a folder that exists")
    page = make_page(read_runs(paths))
    try:
        durable.replace(out, page)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error


def make_page(runs: Sequence[RunRecord]) -> str:
    """The page as HTML."""
    names = ", ".join(run.name for run in runs)
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
            " style-src 'unsafe-inline'; script-src 'unsafe-inline'\">",
            f"<title>Training: {escape(names)}</title>",
            f"<style>{style()}{run_styles(len(runs))}</style></head><body><main>",
            "<h1>Training report</h1>",
            f'<p class="soft">{_subtitle(runs)}</p>',
            _legend(runs),
            figures_table(runs),
            *_sections(runs),
            "<h2>Settings</h2>",
            settings_table(runs),
            _clip_path(),
            f"</main><script>{_script()}</script></body></html>\n",
        )
    )


def _subtitle(runs: Sequence[RunRecord]) -> str:
    finished = sum(run.summary is not None for run in runs)
    what = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    state = "" if finished == len(runs) else f", {len(runs) - finished} not finished"
    parts = [what + state]
    if len(runs) > 1:
        parts.append("settings that differ are marked")
    if any(series.is_thinned for run in runs for series in run.series.values()):
        parts.append("curves are means of neighbouring steps, shaded from lowest to highest")
    return "; ".join(parts)


def _legend(runs: Sequence[RunRecord]) -> str:
    labels = "".join(
        f'<label><input type="checkbox" checked><i class="swatch r{number}"></i>'
        f"{escape(run.name)}</label>"
        for number, run in enumerate(runs)
    )
    return f'<nav class="legend" aria-label="Runs">{labels}</nav>'


def _sections(runs: Sequence[RunRecord]) -> list[str]:
    """The charts of which any run has figures, under their headings."""
    series = [run.series for run in runs]
    end_tokens = max(run.tokens for run in runs)
    sections = []
    for title, charts in _SECTIONS:
        drawn = "".join(draw(chart, series, end_tokens) for chart in charts)
        if drawn:
            sections.append(f'<h2>{title}</h2><div class="charts">{drawn}</div>')
    return sections or ['<p class="soft">No step has been recorded yet.</p>']


def _clip_path() -> str:
    """What charts are cut off at: their axes, and a little room for lines on them."""
    left, top = report_charts.LEFT - 3, report_charts.TOP - 3
    width, height = report_charts.RIGHT + 3 - left, report_charts.BOTTOM + 3 - top
    return (
        '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><clipPath'
        f' id="plot"><rect x="{left}" y="{top}" width="{width}" height="{height}"/></clipPath>'
        "</svg>"
    )


def _script() -> str:
    geometry = (
        report_charts.LEFT,
        report_charts.RIGHT,
        report_charts.TOP,
        report_charts.BOTTOM,
        report_charts.WIDTH,
    )
    return SCRIPT.replace("GEOMETRY", ", ".join(map(str, geometry)))
