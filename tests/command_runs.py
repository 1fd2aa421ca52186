"""Running commands in this process, and what their refusals look like."""

from __future__ import annotations

import click
from click.testing import CliRunner, Result

import cli
from logitshards.commands import Command

COMMANDS: dict[str, Command] = {
    "dump-logits": cli.dump_logits,
    "train-student": cli.train_student,
    "train-student report": cli.report,
    "inspect-shards": cli.inspect_shards,
}
# Enough for each command to be complete but for the option that is tried.
COMPLETE = {
    "dump-logits": ["--teacher", "absent", "--corpus", "absent", "--out", "out"],
    "train-student": ["--shards", "absent", "--student", "demo", "--out", "out", "--tokens", "9"],
    "train-student report": ["absent"],
    "inspect-shards": ["absent"],
}


def run(name: str, *words: str) -> Result:
    """A command with these words."""
    return CliRunner().invoke(COMMANDS[name], words, prog_name=name)


def refused(result: Result) -> str:
    """The one line of a refusal of what was given."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return the_line(result)


def the_line(result: Result) -> str:
    """The one line of any failure."""
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = result.stderr.splitlines()
    return line


def parsed(name: str, *words: str) -> dict[str, object]:
    """The objects that a command's function is called with, by their kinds."""
    seen: dict[str, object] = {}
    made = COMMANDS[name]
    copy = Command(name, lambda *o, **_: seen.update({type(x).__name__: x for x in o}),
                   made._kinds, [p for p in made.params if isinstance(p, click.Argument)],
                   ())  # fmt: skip
    result = CliRunner().invoke(copy, words)
    assert result.exit_code == 0, result.output
    return seen
