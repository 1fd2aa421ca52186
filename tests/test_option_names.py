"""What the commands say names options that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click

from tests.command_runs import COMMANDS

ROOT = Path(__file__).parent.parent
SOURCES = [
    ROOT / "cli.py",
    *(
        path
        for folder in ("logitshards", "shards", "student_train", "teacher_dump")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ),
]
ELSEWHERE = {
    "--version": "of the command itself",
    "--help": "of click",
    "--nproc-per-node": "of torchrun",
    "--nnodes": "of torchrun",
    "--shutdown-timeout": "of torchrun",
}
_WORD = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])")
_STYLE = re.compile(r"var\(--[a-z-]+|--[a-z-]+: ?(#|var)")


def words_of(path: Path) -> set[str]:
    """Words of strings that look like options, without the names of colours in a page's style."""
    return {
        word
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for word in _WORD.findall(_STYLE.sub("", node.value))
    }


def test_every_option_that_a_string_names_exists() -> None:
    options = {
        word
        for made in COMMANDS.values()
        for parameter in made.params
        if isinstance(parameter, click.Option)
        for word in (*parameter.opts, *parameter.secondary_opts)
    }
    found = {path.name: words_of(path) for path in SOURCES}
    unknown = {
        name: sorted(words - options - set(ELSEWHERE))
        for name, words in found.items()
        if words - options - set(ELSEWHERE)
    }
    assert unknown == {}
    assert len(set().union(*found.values()) & options) > 30
