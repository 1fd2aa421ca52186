"""How every command behaves: one-line errors, `--config`, `--debug`, commands within a command.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from shards.errors import LogitshardsError


class Command(click.Command):
    """A command whose errors are one line: exit code 2 for what was given, 1 for a failed run."""

    def invoke(self, ctx: click.Context) -> Any:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for noisy in ("httpx", "filelock", "urllib3", "fsspec"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        debug = ctx.params.pop("debug", False)
        try:
            return super().invoke(ctx)
        except LogitshardsError as error:
            if debug:
                raise
            click.echo(f"{ctx.info_name}: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo(f"\n{ctx.info_name}: interrupted; the same command continues", err=True)
            ctx.exit(130)


class CommandWithOthers(Command):
    """A command that its options call, `NAME --option ...`, and that others hang on, `NAME OTHER`.

    A click.Group would ask for the options of NAME before OTHER.
    """

    def __init__(self, *args: Any, others: Sequence[click.Command], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._others = {other.name: other for other in others}

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """The context of this command, or of another if the first word is its name."""
        other = self._others.get(args[0]) if args else None
        if other is None:
            return super().make_context(info_name, args, parent, **extra)
        return other.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run what the context was made for."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, and below them the other commands."""
        super().format_options(ctx, formatter)
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name or "", other.get_short_help_str(70)) for name, other in self._others.items()]
            )


debug = click.option("--debug", is_flag=True, help="Show a traceback with an error.")


def _load_config_file(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.BadParameter(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise click.BadParameter(f"{path}: expected option names and values")
    known = {
        option.lstrip("-"): parameter.name
        for parameter in ctx.command.params
        for option in parameter.opts
    }
    values = {}
    for key, value in content.items():
        name = known.get(str(key).replace("_", "-"))
        if name is None or name in ("config", "debug", "help"):
            raise click.BadParameter(f"{path}: unknown option {key!r}")
        if name == "engine_arg" and isinstance(value, Mapping):
            value = [f"{argument}={json.dumps(setting)}" for argument, setting in value.items()]
        elif name in ("corpus", "corpus_weight") and not isinstance(value, list):
            value = [value]
        values[name] = value
    ctx.default_map = {**(ctx.default_map or {}), **values}


# What is on the command line wins over the file.
config_file = click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_load_config_file,
    help="YAML file of options by their names; options given here win.",
)
