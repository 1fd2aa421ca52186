"""Every failure of a command is one line on standard error, and an exit code.

The code is 2 for invalid input, 1 for a run that failed, 128 plus its number for a signal, 130 for
Ctrl-C. This includes unexpected errors, even those that are not an `Exception` (a panic in a Rust
library). `--debug` shows the traceback before the line.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

from shards.errors import FailedElsewhereError, LogitshardsError, first_line
from shards.options import OptionError

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def failures_as_lines(name: str, *, debug: bool) -> Iterator[None]:
    """A context in which a failure is printed as "NAME: what went wrong", and ends the command."""
    try:
        yield
    except (click.exceptions.Exit, click.Abort, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # click ends quietly when nobody reads the output any more
        text, exit_code = describe(error)
        if debug:
            click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
        elif isinstance(error, KeyboardInterrupt) and sys.stderr.isatty():
            click.echo(err=True)  # below the ^C
        if not isinstance(error, FailedElsewhereError):
            click.echo(f"{name}: {one_line(text)}", err=True)
        raise click.exceptions.Exit(exit_code) from error


def describe(error: BaseException) -> tuple[str, int]:
    """The message of an error for the user, and the exit code."""
    if isinstance(error, OptionError):
        return error.as_flag(), error.exit_code
    if isinstance(error, LogitshardsError):
        return str(error), error.exit_code
    if isinstance(error, click.ClickException):
        return _usage(error), 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; run the same command again to continue", 130
    kind = type(error).__name__
    text = first_line(error).removeprefix(kind)  # which it is where there is no reason
    if _is_out_of_memory(error, text):
        return f"out of memory{f' ({text})' if text else ''}", 1
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", 1
    return f"internal error: {kind}{': ' if text else ''}{text} (--debug shows the traceback)", 1


def one_line(text: str) -> str:
    """Text without line ends, and without characters that a terminal would act on."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


def _usage(error: click.ClickException) -> str:
    """An error of click in the form of our own: the option first."""
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return f"{_named(error.param)}: missing"
    if isinstance(error, click.BadParameter) and error.param is not None:
        return f"{_named(error.param)} {error.message.rstrip('.')}"
    if isinstance(error, click.NoSuchOption):
        near = f", did you mean {' or '.join(error.possibilities)}?" if error.possibilities else ""
        return f"{error.option_name}: no such option{near}"
    if isinstance(error, click.BadOptionUsage):
        takes_none = "does not take" in error.message
        return f"{error.option_name}: {'takes no value' if takes_none else 'needs a value'}"
    message = error.format_message().rstrip(".")
    return f"{message[:1].lower()}{message[1:]}"


def _named(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Option):
        return parameter.opts[0]
    return parameter.human_readable_name.removesuffix("...")


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    """Whether memory ran out, of the machine or of a GPU: torch has a RuntimeError for both."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in text.lower() for part in _MEMORY)
