"""click commands whose options are made from dataclasses, so that each is typed once.

The fields of a command's dataclasses become its options, and the command calls its function with an
object of each. The dataclass fills in the defaults; click only shows them. Every command has
`--config`, `--debug` and `--version`.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from logitshards.config_file import read_config
from logitshards.failures import failures_as_lines
from logitshards.keep_options import build_keep, is_keep, keep_options
from logitshards.option_types import click_option, path_type
from logitshards.option_values import is_mapping
from logitshards.user import name_the_user
from shards.errors import InputError
from shards.options import OptionField, listed, options_of
from shards.process.stop_signals import stopped_by_signals

_DEBUG = "logitshards.debug"
_GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)


class _OneLineErrors(click.Command):
    """A command whose failures are one line each, those of its options included."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Read the command line."""
        debug = "--debug" in args
        with failures_as_lines(info_name or self.name or "", debug=debug):
            context = super().make_context(info_name, args, parent, **extra)
            context.meta[_DEBUG] = debug
        return context

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with failures_as_lines(ctx.info_name or "", debug=ctx.meta[_DEBUG]):
            return self.run(ctx)

    def run(self, ctx: click.Context) -> Any:
        """What the command does."""
        return super().invoke(ctx)


class Group(_OneLineErrors, click.Group):
    """Commands by their names."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """InputError for a name that no command has."""
        if self.get_command(ctx, args[0]) is None:
            raise InputError(f"{args[0]}: no such command, expected {listed([*self.commands])}")
        return super().resolve_command(ctx, args)


class Command(_OneLineErrors):
    """A command with the options of dataclasses, and with subcommands.

    A subcommand is called as `NAME OTHER`. A click.Group would want the options of NAME first.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., None],
        kinds: Sequence[type[Any]],
        arguments: Sequence[click.Argument],
        others: Sequence[Command],
    ) -> None:
        self._function = function
        self._kinds = kinds
        self._others = {other.name: other for other in others}
        self.options = _all_options(kinds)
        super().__init__(
            name,
            callback=function,
            help=function.__doc__,
            context_settings={"max_content_width": 100},
            params=[*arguments, *map(click_option, self.options.values()), *_common_options()],
        )

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

    def run(self, ctx: click.Context) -> None:
        """Make the objects that the function takes, and call it."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for noisy in ("httpx", "filelock", "urllib3", "fsspec"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        # Warnings from C++, which torch reads this for when it is imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        name_the_user()
        arguments = dict(ctx.params)
        values = {name: arguments.pop(name) for name in self.options}
        given = {
            name: dict(value) if is_mapping(self.options[name].kind) else value
            for name, value in values.items()
            if ctx.get_parameter_source(name) in _GIVEN
        }
        with stopped_by_signals():
            made = [build(kind, given) for kind in self._kinds]
            self._function(*made, **arguments)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, and below them the other commands."""
        super().format_options(ctx, formatter)
        if self._others:
            with formatter.section("Commands"):
                others = self._others.items()
                formatter.write_dl([(name or "", o.get_short_help_str(70)) for name, o in others])


def command(
    name: str,
    *kinds: type[Any],
    arguments: Sequence[click.Argument] = (),
    others: Sequence[Command] = (),
) -> Callable[[Callable[..., None]], Command]:
    """A command that calls a function with an object of each of these dataclasses."""
    return lambda function: Command(name, function, kinds, arguments, others)


def build(kind: type[Any], given: Mapping[str, Any]) -> Any:
    """A dataclass object from the given values of its options. OptionError for an invalid value."""
    values = {}
    for name, option in options_of(kind).items():
        if is_keep(option):
            values[name] = build_keep(option, given)
        elif name in given:
            values[name] = given[name]
    return kind(**values)


def version_option() -> click.Option:
    """`--version`."""
    return click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_show_version,
        help="Show the version and exit.",
    )


def _all_options(kinds: Sequence[type[Any]]) -> dict[str, OptionField]:
    """The options of dataclasses by their names, those of keep methods after `keep`."""
    options: dict[str, OptionField] = {}
    for kind in kinds:
        for name, option in options_of(kind).items():
            more = keep_options(option) if is_keep(option) else {name: option}
            twice = options.keys() & more.keys()
            if twice:
                raise TypeError(f"{kind.__name__}: option {min(twice)} appears twice")
            options.update(more)
    return options


def _common_options() -> list[click.Option]:
    return [
        click.Option(
            ["--config"],
            type=path_type(),
            is_eager=True,
            expose_value=False,
            callback=_take_config,
            metavar="FILE",
            help="YAML file with options by name; the command line overrides it.",
        ),
        click.Option(
            ["--debug"], is_flag=True, expose_value=False, help="Show a traceback with an error."
        ),
        version_option(),
    ]


def _take_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is not None and isinstance(ctx.command, Command):
        values = read_config(path, ctx.command.options)
        # Options that may be repeated, such as --engine-arg KEY=VALUE, are lists for click.
        ctx.default_map = {
            name: list(value.items()) if isinstance(value, dict) else value
            for name, value in values.items()
        }


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from logitshards import __version__

    click.echo(f"logitshards {__version__}")
    ctx.exit()
