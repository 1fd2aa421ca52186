"""The three commands: what they call and what they print, without logic of their own.

Dataclasses define the options (`logitshards/commands.py`). Nothing heavy is imported before a
command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from logitshards.commands import Group, command, version_option
from logitshards.option_types import path_type
from logitshards.show_options import InspectOptions, PlanOptions, ReportOptions
from student_train.config import TrainConfig
from student_train.own_logits.options import SaveLogits
from teacher_dump.config import DumpConfig
from teacher_dump.processes.ranks import ClusterOptions

_RUNS = click.Argument(["runs"], type=path_type(), nargs=-1, required=True, metavar="RUN...")
_PATH = click.Argument(["path"], type=path_type(), metavar="PATH")


@command("dump-logits", DumpConfig, ClusterOptions, PlanOptions)
def dump_logits(config: DumpConfig, cluster: ClusterOptions, plan: PlanOptions) -> None:
    """Run a teacher over a corpus and write its compressed next-token distributions.

    Run the same command again to continue where it stopped.
    """
    from shards.process.allocator import keep_freed_tensors

    keep_freed_tensors()
    if os.path.isdir(config.teacher or config.tokenizer or ""):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if plan.plan:
        from teacher_dump.plan import make_plan

        tokens = None if plan.tokens is None else int(plan.tokens)
        for line in make_plan(config, tokens, cluster.processes).lines():
            click.echo(line)
        return
    from teacher_dump.dump import run

    for line in run(config, cluster).lines():
        click.echo(line)


@command("report", ReportOptions, arguments=[_RUNS])
def report(options: ReportOptions, runs: tuple[Path, ...]) -> None:
    """Show how runs went, finished or not, on one page.

    RUN is the --out folder of a train-student command.
    """
    from student_train.report.page import write_report

    write_report(runs, options.out)
    click.echo(f"{options.out}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}")


@command("train-student", TrainConfig, SaveLogits, others=[report])
def train_student(config: TrainConfig, saving: SaveLogits) -> None:
    """Train a student on the teacher's distributions in one or several datasets.

    Run the same command again to continue from the last checkpoint.
    """
    from shards.process.allocator import choose_arrow_pool

    choose_arrow_pool()
    from student_train.evaluation.definitions import DEFINITIONS
    from student_train.run import run

    for name, value in (run(config, saving) or {}).items():
        parts = value if isinstance(value, list) else [value]
        texts = (f"{part:.6g}" if isinstance(part, float) else f"{part}" for part in parts)
        definition = DEFINITIONS.get(name.removeprefix("validation_"))
        means = "" if definition is None else f" nats ({definition})"
        click.echo(f"{name}: {', '.join(texts)}{means}")


@command("inspect-shards", InspectOptions, arguments=[_PATH])
def inspect_shards(options: InspectOptions, path: Path) -> None:
    """Show what a dataset holds, or check it.

    PATH is the folder of a dataset, or one shard file.
    """
    from shards import inspect

    if options.row is not None:
        from logitshards.decoding import token_decoder

        row, keep = inspect.find_row(path, options.split, options.row)
        click.echo(inspect.format_row(row, keep, token_decoder(path)))
        return
    if options.verify:
        problems = inspect.verify(path)
        for problem in problems:
            click.echo(problem, err=True)
        if problems:
            raise click.exceptions.Exit(1)
        click.echo(f"{path}: sound", err=options.json)
        if not options.json:
            return
    description = inspect.describe(path)
    click.echo(json.dumps(description, indent=2) if options.json else inspect.render(description))


main = Group(
    "main",
    help="The commands of logitshards; each is also installed under its own name.",
    commands=[dump_logits, train_student, inspect_shards],
    params=[version_option()],
    no_args_is_help=False,
)

if __name__ == "__main__":
    main()
